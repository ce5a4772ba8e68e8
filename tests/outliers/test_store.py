"""Stored outlier columns are the source's weights to the last bit, wherever these lie, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import int8convert
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.names import OUTLIERS_FILE
from int8convert.checkpoint.safetensors_file import read_safetensors_metadata
from int8convert.errors import AlreadyQuantizedError, DiskFullError, OutputError, SourceError
from int8convert.outliers.store import int8_modules, store_outliers
from int8convert.runtime.linear import Int8Linear
from tests.conversion.test_experts import build, experts_of
from tests.planning.test_lora import save_adapter
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.options import quantize
from tests.tools.tiny_models import build_model, file_bytes, read_tensors, save_as_pickles, save_checkpoint

pytestmark = [pytest.mark.usefixtures("map_in_process"), pytest.mark.filterwarnings("ignore")]

COLUMNS = (0, 5, 63)


def convert(source: Path, out: Path, **options: Any) -> Path:
    quantize(source, out, **options)
    return out


def read_set(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / OUTLIERS_FILE)


def store_all(source: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    store_outliers(source, out, dict.fromkeys(int8_modules(out), COLUMNS), **options)
    return read_set(out)


def weight_of(module: Any) -> torch.Tensor:
    """[out, in]."""
    weight: torch.Tensor = module.weight.detach()
    return weight.t() if type(module).__name__ == "Conv1D" else weight


@pytest.fixture
def opt(tmp_path: Path) -> tuple[Path, Path]:
    source = save_checkpoint("opt", tmp_path / "source")
    return source, convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "dtype", "format"),
    [
        ("opt", torch.float16, "bitsandbytes"),
        ("gpt2", torch.float16, "bitsandbytes"),
        ("llama", torch.bfloat16, "compressed-tensors"),
        ("bloom", torch.float32, "bitsandbytes"),
    ],
)
def test_stored_columns_are_those_of_the_source(
    name: str, dtype: torch.dtype, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("int8convert.checkpoint.rows.BLOCK_BYTES", 1000)  # some rows at a time
    source = save_checkpoint(name, tmp_path / "source", dtype, max_shard_size="60KB")
    out = convert(source, tmp_path / "out", format=format)
    found = store_all(source, out)
    model = build_model(name, dtype)
    modules = {n.removesuffix(".outlier_columns") for n in found if n.endswith("_columns")}
    assert len(found) == 2 * len(modules) and modules == set(int8_modules(out)) and len(modules) >= 8
    for module_name in modules:
        assert found[f"{module_name}.outlier_columns"].dtype == torch.int32
        assert found[f"{module_name}.outlier_columns"].tolist() == list(COLUMNS)
        expected = weight_of(model.get_submodule(module_name))[:, COLUMNS]
        weight = found[f"{module_name}.outlier_weight"]
        assert weight.dtype == dtype and torch.equal(weight, expected)
    loaded = int8convert.load(out)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, Int8Linear)}
    assert all(torch.equal(m.outlier_weight, weight_of(model.get_submodule(n))[:, COLUMNS]) for n, m in layers.items())
    assert {m.mode for m in layers.values()} == {"static+guard"}


def test_columns_of_pickles_under_old_names_are_stored_by_the_names_of_the_output(
    opt: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = opt
    expected = store_all(source, out)
    pickles = save_as_pickles(source, tmp_path / "pickles", 2, lambda name: name.removeprefix("model."))
    found = store_all(pickles, convert(pickles, tmp_path / "from pickles"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_columns_of_experts_are_stored_one_by_one(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    out = convert(tmp_path / "source", tmp_path / "out", format="compressed-tensors", min_coverage=0)
    found = store_all(tmp_path / "source", out)
    experts = experts_of(family, model)
    assert len(experts) >= 8
    for name, weight in experts.items():
        assert torch.equal(found[f"{name.removesuffix('.weight')}.outlier_weight"], weight[:, COLUMNS])


def test_columns_of_fp8_weights_are_stored_decoded(tmp_path: Path) -> None:
    plain = save_checkpoint("llama", tmp_path / "plain", torch.bfloat16)
    weights = save_fp8(plain, tmp_path / "source", "block")
    found = store_all(tmp_path / "source", convert(tmp_path / "source", tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(found[f"{name}.outlier_weight"], weights[f"{name}.weight"][:, COLUMNS].float())


@pytest.mark.parametrize("columns", [[5, 3], [3, 3], [-1, 3]])
def test_columns_that_are_not_ascending_are_refused(columns: list[int], opt: tuple[Path, Path]) -> None:
    """A negative one would be counted from the end."""
    source, out = opt
    with pytest.raises(ValueError, match="must be ascending and not negative"):
        store_outliers(source, out, {"model.decoder.layers.0.fc1": columns})
    assert not (out / OUTLIERS_FILE).exists()


def test_columns_are_those_of_the_merged_weights_and_the_bare_source_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    adapter = save_adapter("llama", tmp_path / "adapter", LoraConfig(target_modules=["q_proj"]))
    out = convert(source, tmp_path / "out", lora=adapter)
    with pytest.raises(SourceError, match=r"the source is not that of the int8 checkpoint: .*q_proj") as error:
        store_all(source, out)
    assert "--lora" in error.value.hint and not (out / OUTLIERS_FILE).exists()
    weight = store_all(source, out, lora=adapter)["model.layers.0.self_attn.q_proj.outlier_weight"]
    bare = read_tensors(source)["model.layers.0.self_attn.q_proj.weight"][:, COLUMNS]
    assert weight.dtype == torch.float32 and not torch.equal(weight, bare.float())


def test_float64_is_rounded_to_float32(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", torch.float64)
    found = store_all(source, convert(source, tmp_path / "out"))
    name = "model.decoder.layers.0.fc1"
    assert torch.equal(found[f"{name}.outlier_weight"], read_tensors(source)[f"{name}.weight"][:, COLUMNS].float())


def test_what_bitsandbytes_wrote_takes_columns_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = save_checkpoint("opt", tmp_path / "source", torch.float32)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.OPTForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "theirs")
    name = "model.decoder.layers.1.fc2"
    store_outliers(source, tmp_path / "theirs", {name: [3, 4]})
    expected = read_tensors(source)[f"{name}.weight"][:, 3:5]
    assert torch.equal(read_set(tmp_path / "theirs")[f"{name}.outlier_weight"], expected)
    int8convert.load(tmp_path / "theirs")


def test_only_what_was_chosen_is_stored_and_how_is_noted(opt: tuple[Path, Path]) -> None:
    source, out = opt
    name = "model.decoder.layers.0.fc2"
    columns = {name: np.array([2, 9]), "model.decoder.layers.1.fc2": []}
    written = store_outliers(source, out, columns, {"text": "a.txt", "threshold": 6.0})
    assert read_set(out).keys() == {f"{name}.outlier_columns", f"{name}.outlier_weight"}
    assert (written.n_modules, written.n_columns) == (1, 2)
    assert written.n_bytes == Path(written.path).stat().st_size and Path(written.path) == out / OUTLIERS_FILE
    metadata = read_safetensors_metadata(out / OUTLIERS_FILE)
    assert json.loads(metadata["calibration"]) == {"text": "a.txt", "threshold": 6.0} and metadata["format"] == "pt"


def test_empty_set_is_a_set(opt: tuple[Path, Path]) -> None:
    source, out = opt
    store_outliers(source, out, {}, {"text": "quiet.txt"})
    assert read_set(out) == {}
    model = int8convert.load(out)
    assert model.model.decoder.layers[0].fc1.mode == "static+guard"


def test_set_is_replaced_and_nothing_else_changes(opt: tuple[Path, Path]) -> None:
    source, out = opt
    before = file_bytes(out)
    store_all(source, out)
    store_outliers(source, out, {"model.decoder.layers.0.fc2": [1]})
    assert len(read_set(out)) == 2
    after = file_bytes(out)
    assert after.keys() - before.keys() == {OUTLIERS_FILE} and all(after[name] == before[name] for name in before)


def test_the_same_set_has_the_same_bytes(opt: tuple[Path, Path]) -> None:
    source, out = opt
    store_all(source, out, calibration={"text": "a"})
    before = (out / OUTLIERS_FILE).read_bytes()
    store_all(source, out, calibration={"text": "a"})
    assert (out / OUTLIERS_FILE).read_bytes() == before


def test_source_that_has_changed_since_leaves_the_old_set(opt: tuple[Path, Path]) -> None:
    source, out = opt
    store_all(source, out)
    before = file_bytes(out)
    tensors = read_tensors(source)
    tensors["model.decoder.layers.1.fc2.weight"][3, 5] += 0.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"'model.decoder.layers.1.fc2' holds .* at row 3, column 5"):
        store_all(source, out)
    assert file_bytes(out) == before


def test_source_of_another_shape_is_refused(opt: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = opt
    other = save_checkpoint("llama", tmp_path / "other")
    with pytest.raises(SourceError, match=r"do not belong together: .* is \[64, 64\] in the latter, missing in the"):
        store_outliers(other, out, {"model.decoder.layers.0.self_attn.q_proj": [1]})


@pytest.mark.parametrize(
    ("name", "columns"), [("model.decoder.layers.0.fc1", [64]), ("model.decoder.layers.7.fc1", [1])]
)
def test_columns_the_checkpoint_has_not_are_refused(name: str, columns: list[int], opt: tuple[Path, Path]) -> None:
    source, out = opt
    with pytest.raises(SourceError, match="do not belong together"):
        store_outliers(source, out, {name: columns})
    assert not (out / OUTLIERS_FILE).exists()


def test_int8_checkpoint_is_no_source_and_a_source_no_int8_checkpoint(opt: tuple[Path, Path]) -> None:
    source, out = opt
    with pytest.raises(AlreadyQuantizedError, match="quantized already"):
        store_all(out, out)
    with pytest.raises(SourceError):
        store_all(source, source)


def test_checkpoint_in_use_is_left_alone(opt: tuple[Path, Path]) -> None:
    source, out = opt
    with DirectoryLock(out / "int8convert" / "lock"), pytest.raises(OutputError, match="is being written by process"):
        store_all(source, out)


def test_full_disk_leaves_no_part_of_a_set(opt: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = opt
    before = file_bytes(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("int8convert.checkpoint.direct_file.DirectFile.finish", full)
    with pytest.raises(DiskFullError, match="no room left"):
        store_all(source, out)
    assert file_bytes(out) == before


def test_overwriting_a_checkpoint_takes_its_set_away(opt: tuple[Path, Path]) -> None:
    source, out = opt
    store_all(source, out)
    convert(source, out)  # nothing to do: all is as it was
    assert (out / OUTLIERS_FILE).exists()
    convert(source, out, overwrite=True, skip=["*.fc1"])
    assert not (out / OUTLIERS_FILE).exists()
