"""Outliers that were put into a model are found, exactly those; in a model without any, none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import int8convert
from int8convert.errors import CorruptFileError, DeviceError, SourceError
from int8convert.events import Event, MeasurementStarted
from int8convert.outliers.find import find_outliers
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import read_windows
from tests.tools.language_models import language_model
from tests.tools.outlier_models import SCALED, SHIFTED, convert, outlier_model, save
from tests.tools.tiny_models import edit_config, read_tensors, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

READ_NORMS = ("q_proj", "k_proj", "v_proj", "fc1")
SMALL: dict[str, Any] = {"n_sequences": 4, "length": 40}


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:
    """A checkpoint with outlier features at the dimensions of SHIFTED and SCALED."""
    return save(outlier_model(tokenizer), tmp_path / "source", tokenizer, torch.float32)


def largest_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Module name -> all it read, [tokens, in]."""
    read: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda m, i, name=name: read.setdefault(name, []).append(i[0].flatten(0, -2))
            )
    with torch.no_grad():
        model(ids)
    return {name: torch.cat(parts) for name, parts in read.items()}


def test_injected_outliers_are_found_exactly(source: Path, text: Path, tokenizer: Any) -> None:
    report = find_outliers(source, Text(text, **SMALL), device="cpu")
    assert [f.column for f in report.features] == sorted({**SHIFTED, **SCALED})
    by_column = {f.column: f for f in report.features}
    assert [by_column[k].sides for k in (7, 50, 21)] == ["positive", "negative", "two-sided"]
    inputs = largest_inputs(outlier_model(tokenizer), read_windows(text, tokenizer, 4, 40).ids)
    assert {entry.module_name for entry in report.inputs} == inputs.keys() - {"lm_head"}
    for entry in report.inputs:
        x = inputs[entry.module_name]
        reached = (x.abs() >= 6).sum(0)
        assert {c.column: c.share for c in entry.columns} == {
            k: int(reached[k]) / len(x) for k in reached.nonzero()[:, 0].tolist()
        }
        assert entry.extreme == pytest.approx(float(x.abs().max()), rel=1e-4)
        assert entry.n_tokens == len(x) == 160
        if entry.projection in READ_NORMS:
            assert {c.column for c in entry.columns} == {*SHIFTED, *SCALED}
            assert [c.share for c in entry.columns if c.column in SHIFTED] == [1.0, 1.0]
    norms = [
        inputs[f"model.decoder.layers.{i}.{name}"]
        for i in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1")
    ]
    share = torch.stack([(x.abs() >= 6).double().mean(0) for x in norms]).mean(0)
    for k, feature in by_column.items():
        assert feature.position_share == pytest.approx(float(share[k])) and feature.layer_share == 1.0
        assert abs(feature.extreme) == pytest.approx(max(float(x[:, k].abs().max()) for x in norms), rel=1e-4)


def test_no_outliers_are_found_where_there_are_none(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    plain = save(outlier_model(tokenizer, {}, {}), tmp_path / "plain", tokenizer)
    report = find_outliers(plain, Text(text, **SMALL), with_ablation=True, budget=0, device="cpu")
    assert report.features == () and report.ablation == () and report.static_set == {}
    assert all(entry.columns == () for entry in report.inputs if entry.projection in READ_NORMS)


def test_threshold_is_the_callers(source: Path, text: Path) -> None:
    report = find_outliers(source, Text(text, **SMALL), threshold=500.0, device="cpu")
    assert report.features == () and report.threshold == 500.0


def test_int8_checkpoint_shows_what_its_source_shows(source: Path, text: Path, tmp_path: Path) -> None:
    of_source, of_int8 = (
        find_outliers(p, Text(text, **SMALL), device="cpu") for p in (source, convert(source, tmp_path / "out"))
    )
    assert [f.column for f in of_int8.features] == [f.column for f in of_source.features]
    assert [entry.module_name for entry in of_int8.inputs] == [entry.module_name for entry in of_source.inputs]
    for a, b in zip(of_source.features, of_int8.features, strict=True):
        assert b.extreme == pytest.approx(a.extreme, rel=0.05) and b.sides == a.sides


def test_static_set_holds_the_features_of_every_layer_that_reads_them(source: Path, text: Path) -> None:
    report = find_outliers(source, Text(text, **SMALL), budget=0, device="cpu")
    frequent = {
        entry.module_name: {c.column for c in entry.columns if c.share >= 0.06}
        for entry in report.inputs
        if entry.columns
    }
    assert {name: set(columns) for name, columns in report.static_set.items()} == {
        n: c for n, c in frequent.items() if c
    }
    assert all({*SHIFTED} <= set(report.static_set[f"model.decoder.layers.{i}.fc1"]) for i in (0, 1))
    rows = {"q_proj": 64, "k_proj": 64, "v_proj": 64, "out_proj": 64, "fc1": 128, "fc2": 64}
    assert report.static_set_bytes == sum(2 * rows[n.rpartition(".")[2]] * len(c) for n, c in report.static_set.items())
    assert report.int8_bytes == 2 * (4 * 64 * 64 + 2 * 64 * 128)


def test_calibrate_finds_the_same_set(source: Path, text: Path, tokenizer: Any) -> None:
    report = find_outliers(source, Text(text, **SMALL), device="cpu")
    model = outlier_model(tokenizer)
    ids = read_windows(text, tokenizer, 4, 40).ids
    found = int8convert.choose_outliers(model, [ids])
    del found["lm_head"]  # which calibrate looks at, and which is never int8
    assert {n: s.columns.tolist() for n, s in found.items() if s.columns.numel()} == {
        name: list(columns) for name, columns in report.static_set.items()
    }


def test_ablation_is_of_the_features_found(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save(outlier_model(tokenizer, scaled={}), tmp_path / "source", tokenizer, torch.float32)
    report = find_outliers(source, Text(text, **SMALL), with_ablation=True, device="cpu")
    assert [run.columns for run in report.ablation[:2]] == [(), (7, 50)]
    assert find_outliers(source, Text(text, **SMALL), device="cpu").ablation == ()


def test_layer_by_layer_the_same_is_found_as_in_memory(source: Path, text: Path) -> None:
    events: list[Event] = []
    found, whole = (
        find_outliers(source, Text(text, **SMALL), with_ablation=is_whole, device="cpu", on_event=events.append)
        for is_whole in (False, True)
    )
    assert [event.streamed for event in events if isinstance(event, MeasurementStarted)] == [True, False]
    assert found.static_set == whole.static_set and found.static_set_bytes == whole.static_set_bytes
    assert [f.column for f in found.features] == [f.column for f in whole.features]
    for a, b in zip(found.inputs, whole.inputs, strict=True):
        assert (a.module_name, a.n_tokens, a.is_hidden_state) == (b.module_name, b.n_tokens, b.is_hidden_state)
        assert [(c.column, c.share, c.sides) for c in a.columns] == [(c.column, c.share, c.sides) for c in b.columns]
        assert a.extreme == pytest.approx(b.extreme, rel=1e-5)


def test_report_is_json_with_the_unit_in_every_name(source: Path, text: Path) -> None:
    found = json.loads(
        json.dumps(
            find_outliers(source, Text(text, **SMALL), with_ablation=True, device="cpu").to_json(), allow_nan=False
        )
    )
    assert found["schema"] == 1 and found["n_sequences"] == 4 and found["length"] == 40 and "largest" not in found
    assert found["features"][0].keys() >= {"column", "layer_share", "position_share", "extreme", "sides", "quartiles"}
    assert found["inputs"][0]["columns"][0].keys() >= {"column", "share", "extreme", "sides", "quartiles"}
    assert found["static_set"]["model.decoder.layers.0.fc1"] and found["ablation"][0]["name"] == "none"


def test_numbers_that_json_has_not_become_null(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    model = outlier_model(tokenizer)
    model.model.decoder.layers[0].self_attn_layer_norm.weight.data[3] = float("nan")
    source = save(model, tmp_path / "source", tokenizer, torch.float32)
    found = json.dumps(find_outliers(source, Text(text, **SMALL), device="cpu").to_json(), allow_nan=False)
    assert json.loads(found)["inputs"][0]["extreme"] is None


def test_encoder_decoder_is_looked_at_on_both_sides_but_not_ablated(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save(language_model("t5", tokenizer), tmp_path / "source", tokenizer, torch.float32)
    report = find_outliers(source, Text(text, **SMALL), device="cpu")
    assert {entry.layer for entry in report.inputs} >= {"encoder.block.0", "decoder.block.1"}
    with pytest.raises(SourceError, match="ablation needs a model that predicts the next token"):
        find_outliers(source, Text(text, **SMALL), with_ablation=True, device="cpu")


def test_windows_are_taken_from_all_over_the_text_and_never_twice(text: Path, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    windows = read_windows(text, tokenizer, 3, 20)
    assert windows.n_text_tokens == len(ids) and windows.ids.shape == (3, 20)
    starts = [next(i for i in range(len(ids) - 20) if torch.equal(ids[i : i + 20], w)) for w in windows.ids]
    n = len(ids) // 20
    all_windows = ids[: n * 20].view(n, 20)
    assert torch.equal(windows.ids, all_windows[[0, n // 3, 2 * n // 3]]) and starts[0] == 0
    assert len(read_windows(text, tokenizer, 10**6, 20).ids) == n


def test_text_shorter_than_a_window_is_one_window(tmp_path: Path, tokenizer: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the cat")
    assert torch.equal(read_windows(short, tokenizer, 3, 50).ids[0], torch.tensor(tokenizer("the cat")["input_ids"]))


def test_window_begins_as_the_tokenizer_begins_a_text(text: Path, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    windows = read_windows(text, tokenizer, 3, 20)
    assert windows.ids.shape == (3, 20) and windows.ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert (windows.ids[:, 1:] != tokenizer.bos_token_id).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"ab\xff", "byte 2 is not UTF-8"),
        (b"a", "has 1 tokens, expected at least 2"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes | None, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_windows(path, tokenizer, 1, 10)


def test_window_longer_than_the_model_takes_is_refused(source: Path, text: Path) -> None:
    with pytest.raises(SourceError, match="the model takes 64 tokens, and the windows have 65") as error:
        find_outliers(source, Text(text, n_sequences=1, length=65), device="cpu")
    assert "--length 64" in error.value.hint
    assert find_outliers(source, Text(text, n_sequences=1), device="cpu").length == 64


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_checkpoint_without_a_tokenizer_is_refused(name: str, tmp_path: Path, text: Path) -> None:
    """transformers makes an empty one for OPT, and says so for Llama."""
    with pytest.raises(SourceError, match="has no tokenizer that transformers can read"):
        find_outliers(save_checkpoint(name, tmp_path / "source"), Text(text, **SMALL), device="cpu")


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    tokenizer.save_pretrained(source)
    with pytest.raises(SourceError, match=r"the text has token \d+, and the model knows only \d+"):
        find_outliers(source, Text(text, **SMALL), device="cpu")


def test_checkpoint_that_lacks_weights_is_refused(source: Path, text: Path) -> None:
    from safetensors.torch import save_file

    tensors = read_tensors(source)
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CorruptFileError, match=r"has no 'model.decoder.layers.1.fc1.weight', or none of the right shape"
    ):
        find_outliers(source, Text(text, **SMALL), device="cpu")


def test_config_transformers_cannot_read_is_refused(source: Path, text: Path) -> None:
    edit_config(source, model_type="novel")
    with pytest.raises(
        SourceError,
        match=r"cannot be read as a checkpoint: ValueError: .* model type `novel`",
    ):
        find_outliers(source, Text(text, **SMALL), device="cpu")


def test_names_of_another_model_are_refused(source: Path, text: Path) -> None:
    with pytest.raises(SourceError, match="none of the layers that the int8 checkpoint holds"):
        find_outliers(source, Text(text, **SMALL), module_names=["transformer.h.0.mlp"], device="cpu")


def test_names_without_the_base_models_prefix_are_understood(source: Path, text: Path) -> None:
    report = find_outliers(source, Text(text, **SMALL), module_names=["decoder.layers.0.fc1"], budget=0, device="cpu")
    assert [entry.module_name for entry in report.inputs] == ["decoder.layers.0.fc1"] and set(report.static_set) == {
        "decoder.layers.0.fc1"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_device_that_is_not_there_is_an_error(source: Path, text: Path) -> None:
    with pytest.raises(DeviceError, match="torch finds no usable GPU"):
        find_outliers(source, Text(text, n_sequences=1, length=10), device="cuda")


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 0.0},
        {"threshold": float("nan")},
        {"min_share": 1.1},
        {"budget": -1},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], source: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="must be"):
        find_outliers(source, Text(text, **SMALL), device="cpu", **wrong)
