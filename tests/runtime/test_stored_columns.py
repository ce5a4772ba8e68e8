"""Stored outlier columns against outlier columns out of the codes, on a model that has outlier features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.stored_columns import attach_outliers, write_outliers

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FEATURES = [5, 30, 44, 59, 77, 101]
FACTOR = 200.0


@pytest.fixture(scope="module")
def source() -> Any:
    """An OPT whose LayerNorms put out six features 200 times as large, for columns that are as much smaller."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=512,
        word_embed_proj_dim=128,
        max_position_embeddings=64,
        init_std=0.15,
    )
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            attention = layer.self_attn
            for norm, readers in (
                (layer.self_attn_layer_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.final_layer_norm, (layer.fc1,)),
            ):
                norm.weight[FEATURES] *= FACTOR
                norm.bias[FEATURES] *= FACTOR
                for linear in readers:
                    linear.weight[:, FEATURES] /= FACTOR
    return model


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    """Token ids of six texts; the first two are what is calibrated on."""
    return list(torch.randint(3, 256, (6, 48), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def out(source: Any, tmp_path: Path) -> Path:
    source.save_pretrained(tmp_path / "source")
    int8convert.quantize(tmp_path / "source", tmp_path / "out", on_event=lambda event: None)
    return tmp_path / "out"


@torch.no_grad()
def mean_kl(model: Any, reference: Any, texts: list[torch.Tensor]) -> float:
    def log_probabilities(of: Any) -> torch.Tensor:
        return of(torch.stack(texts)).logits.double().log_softmax(-1)

    exact = log_probabilities(reference)
    return float((exact.exp() * (exact - log_probabilities(model))).sum(-1).mean())


def test_calibration_finds_the_outlier_features_and_no_others(source: Any, texts: list[torch.Tensor]) -> None:
    found = int8convert.choose_outliers(source, texts[:2], budget=0)
    for i in range(2):
        path = f"model.decoder.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"):
            stored = found[f"{path}.{name}"]
            assert stored.columns.tolist() == FEATURES
            weight = source.get_submodule(f"{path}.{name}").weight
            assert torch.equal(stored.weight, weight[:, FEATURES])
        assert not set(FEATURES) & set(found[f"{path}.self_attn.out_proj"].columns.tolist())


@pytest.mark.parametrize("mode", [OutlierMode.STATIC, OutlierMode.STATIC_GUARD])
def test_stored_columns_come_fifty_times_nearer_than_bitsandbytes(
    mode: OutlierMode, source: Any, texts: list[torch.Tensor], out: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    theirs = transformers.OPTForCausalLM.from_pretrained(out, device_map="cpu")
    model = int8convert.load(out)
    kl_by_codes = mean_kl(theirs, source, texts[2:])
    assert mean_kl(model, source, texts[2:]) == pytest.approx(kl_by_codes, rel=0.2)
    attach_outliers(model, int8convert.choose_outliers(source, texts[:2]), mode)
    assert 0 < mean_kl(model, source, texts[2:]) <= kl_by_codes / 50


def test_what_is_written_is_what_is_loaded(source: Any, texts: list[torch.Tensor], out: Path) -> None:
    model = int8convert.load(out)
    attach_outliers(model, int8convert.choose_outliers(source, texts[:2]), OutlierMode.STATIC)
    write_outliers(model, out)
    again = int8convert.load(out, outliers="static")
    with torch.no_grad():
        assert torch.equal(again(texts[3][None]).logits, model(texts[3][None]).logits)


def test_static_sequences_do_not_depend_on_their_neighbours_and_dynamic_ones_do(
    source: Any, texts: list[torch.Tensor], out: Path
) -> None:
    model = int8convert.load(out)
    found = int8convert.choose_outliers(source, texts[:2])
    # A neighbour that sends another feature past the threshold.
    neighbours = torch.stack(texts[2:])
    differs = {}
    for mode in (OutlierMode.STATIC, OutlierMode.DYNAMIC):
        attach_outliers(model, found, mode)
        for layer in model.modules():
            if isinstance(layer, Int8Linear):
                layer.threshold = 3.0
        with torch.no_grad():
            alone, together = model(texts[2][None]).logits[0], model(neighbours).logits[0]
        differs[mode] = float((alone - together).abs().max())
    # float32 products of another shape may be summed in another order, outside of our layers.
    assert differs[OutlierMode.STATIC] <= 1e-3 * differs[OutlierMode.DYNAMIC]
