"""Checkpoints whose keys are not the model's own: without the base prefix, or of an earlier version of the class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import int8convert
from tests.scenarios.test_architectures import llava
from tests.tools.family_check import run_model
from tests.tools.tiny_models import read_tensors

bitsandbytes = pytest.importorskip("bitsandbytes")

# transformers, bitsandbytes and torch have their remarks on tiny models, on tied weights and on int8.
pytestmark = pytest.mark.filterwarnings("ignore")

_BERT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_renamed(model: Any, directory: Path, rename: Callable[[str], str]) -> list[str]:
    """Write a model in fp16 under other names; the names."""
    model.half().save_pretrained(directory)
    tensors = {rename(name): tensor for name, tensor in read_tensors(directory).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return sorted(tensors)


def check_like_plain(model: Any, folder: Path, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Convert a model under its own names and renamed; both must load complete, with the same int8 weights inside.

    Returns:
        the tensors of the output made from the renamed source.
    """
    model_class = type(model)
    plain = save_renamed(model, folder / "plain", str)
    assert save_renamed(model, folder / "source", rename) != plain
    loaded = []
    for name in ("plain", "source"):
        int8convert.quantize(
            folder / name, folder / f"{name} int8", int8convert.PlanOptions(min_coverage=0), on_event=lambda event: None
        )
        int8_model, info = model_class.from_pretrained(
            folder / f"{name} int8", device_map="cpu", output_loading_info=True
        )
        assert not any(info.values()), info
        loaded.append(int8_model)
    expected, found = (int8_model.state_dict() for int8_model in loaded)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(tensor.dtype == torch.int8 for tensor in found.values()) >= 8
    assert torch.equal(run_model(loaded[0]), run_model(loaded[1]))
    return read_tensors(folder / "source int8")


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**_BERT, vocab_size=128)).eval()


def test_gamma_and_beta_are_norms(tmp_path: Path, map_in_process: None) -> None:
    """BERT as first published."""

    def rename(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    ours = check_like_plain(bert(), tmp_path, rename)
    assert ours["bert.embeddings.LayerNorm.gamma"].dtype == torch.float16
    assert ours["bert.encoder.layer.0.attention.self.query.weight"].dtype == torch.int8


def test_base_model_without_its_prefix(tmp_path: Path, map_in_process: None) -> None:
    ours = check_like_plain(bert(), tmp_path, lambda name: name.removeprefix("bert."))
    assert "bert.encoder.layer.0.attention.self.query.SCB" in ours


def test_base_model_from_a_checkpoint_with_the_prefix(tmp_path: Path, map_in_process: None) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**_BERT, vocab_size=128)).eval()
    ours = check_like_plain(model, tmp_path, lambda name: f"bert.{name}")
    assert "encoder.layer.0.attention.self.query.SCB" in ours


def test_vision_language_model_under_the_names_of_today(tmp_path: Path, map_in_process: None) -> None:
    """transformers saves LLaVA under the names it was published with, and loads it under those of its classes too."""
    torch.manual_seed(0)
    today = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}

    def rename(name: str) -> str:
        renamed = next((new + name.removeprefix(old) for old, new in today.items() if name.startswith(old)), name)
        return f"model.{renamed}" if renamed.startswith(("vision_tower.", "multi_modal_projector.")) else renamed

    ours = check_like_plain(llava().eval(), tmp_path, rename)
    plain = read_tensors(tmp_path / "plain int8")
    for module in ("language_model.model.layers.0.mlp.up_proj", "vision_tower.encoder.layers.0.mlp.fc1"):
        assert torch.equal(plain[f"{module}.weight"], ours[f"{rename(module)}.weight"])
        assert torch.equal(plain[f"{module}.SCB"], ours[f"{rename(module)}.SCB"])


def test_weight_norm_of_older_torch(tmp_path: Path, map_in_process: None) -> None:
    """weight_g and weight_v are what torch calls parametrizations.weight.original0 and 1 today."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **_BERT, conv_dim=[32, 32], conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=16
    )
    model = transformers.Wav2Vec2Model(config).eval()
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def rename(name: str) -> str:
        head, dot, tail = name.partition("parametrizations.weight.")
        return head + names[dot + tail] if dot else name

    assert "encoder.pos_conv_embed.conv.weight_g" in save_renamed(model, tmp_path / "source", rename)
    int8convert.quantize(
        tmp_path / "source", tmp_path / "ours", int8convert.PlanOptions(min_coverage=0), on_event=lambda event: None
    )
    loaded, info = transformers.Wav2Vec2Model.from_pretrained(
        tmp_path / "ours", device_map="cpu", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(loaded.encoder.pos_conv_embed.conv.weight, model.encoder.pos_conv_embed.conv.weight)
    assert isinstance(loaded.encoder.layers[0].attention.q_proj, bitsandbytes.nn.Linear8bitLt)
