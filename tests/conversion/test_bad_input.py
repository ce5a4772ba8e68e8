"""Bad input gets two lines that say what to do, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import int8convert
from int8convert import errors
from int8convert.events import Event, PlanMade
from tests.tools.options import quantize
from tests.tools.tiny_models import file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


def fail(source: Path, out: Path, error: type[errors.Int8ConvertError], match: str, **options: Any) -> None:
    """The conversion raises, in two plain lines, and the disk is as before."""
    before = file_bytes(out.parent)
    with pytest.raises(error, match=match) as caught:
        quantize(source, out, **options)
    for line in (caught.value.message, caught.value.hint):
        assert line and "\n" not in line and not line.endswith(".")
    assert file_bytes(out.parent) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_missing_directory(tmp_path: Path) -> None:
    fail(tmp_path / "nowhere", tmp_path / "out", errors.SourceError, "nothing there")


def test_file_instead_of_directory(source: Path, tmp_path: Path) -> None:
    fail(source / "config.json", tmp_path / "out", errors.SourceError, "a file")


def test_no_weights(source: Path, tmp_path: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    fail(source, tmp_path / "out", errors.SourceError, "holds no weights")


def test_truncated_shard(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    fail(source, tmp_path / "out", errors.CorruptFileError, rf"'{shard.name}' is truncated: .* promises [\d,]+ bytes")


def test_index_naming_a_missing_file(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    fail(source, tmp_path / "out", errors.CorruptFileError, f"names shard '{shard.name}', which is not there")


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_pointing_elsewhere(target: str, source: Path, tmp_path: Path) -> None:
    index = source / "model.safetensors.index.json"
    edit_json(index, lambda value: value["weight_map"].update({"x.weight": target}))
    fail(source, tmp_path / "out", errors.CorruptFileError, "not a plain file name")


def test_index_without_a_map(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    fail(source, tmp_path / "out", errors.CorruptFileError, "has no weight_map")


def test_config_without_architecture(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", lambda value: value.pop("architectures"))
    fail(source, tmp_path / "out", errors.ModelMapError, "names no architecture")


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"a":' * 5000])
def test_config_that_is_no_json_object(text: str, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(text)
    fail(source, tmp_path / "out", errors.CorruptFileError, r"'config\.json'")


def test_already_quantized_source(source: Path, tmp_path: Path) -> None:
    int8convert.quantize(source, tmp_path / "int8", on_event=lambda event: None)
    fail(tmp_path / "int8", tmp_path / "out", errors.AlreadyQuantizedError, "bitsandbytes")


def test_out_that_exists(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    fail(source, tmp_path / "out", errors.OutputError, "exists and is not empty")


def test_out_that_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    fail(source, tmp_path / "out", errors.OutputError, "is a file", overwrite=True)


@pytest.mark.parametrize("name", ["source", "link", ".", "source/../source"])
def test_source_as_out(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    before = file_bytes(source)
    with pytest.raises(errors.OutputError, match="is the source itself, or holds it"):
        int8convert.quantize(source, tmp_path / name, overwrite=True)
    assert file_bytes(source) == before


def test_no_room_is_seen_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fail(source, tmp_path / "out", errors.DiskFullError, r"needs [\d,]+ bytes, its disk has 1,000 free")


def test_failure_in_an_existing_directory_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    fail(source, tmp_path / "out", errors.DiskFullError, "no room left")
    assert (tmp_path / "out").is_dir()


def test_shard_that_shrinks_while_it_is_read(source: Path, tmp_path: Path) -> None:
    shards = sorted(source.glob("*.safetensors"))

    def shrink(event: Event) -> None:
        if isinstance(event, PlanMade):
            os.truncate(shards[-1], 5000)

    with pytest.raises(errors.CorruptFileError, match="was changed since its header was read") as caught:
        int8convert.quantize(source, tmp_path / "out", on_event=shrink)
    assert caught.value.state == "2 finished shards are kept: the same command resumes after them"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(dtype: torch.dtype, bad: float, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    tensors = read_tensors(source)
    tensors["model.layers.1.mlp.up_proj.weight"][100, 61:63] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    value = {"nan": "NaN", "inf": "infinity", "-inf": "-infinity"}[str(bad)]
    fail(
        source,
        tmp_path / "out",
        errors.NonFiniteWeightError,
        rf"'model\.layers\.1\.mlp\.up_proj\.weight' in 'model\.safetensors' holds {value} at row 100, "
        r"column 61 \(2 such values\)",
    )


def test_values_that_are_not_finite_are_counted_in_the_whole_tensor(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.float32)
    tensors = read_tensors(source)
    for name in [name for name in tensors if "mlp" in name]:  # a hundred times as large: several blocks
        tensors[name] = torch.cat([tensors[name]] * 100, dim=1 if "down" in name else 0)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[100, 61:63], weight[12_000, 5], weight[12_001] = float("nan"), float("inf"), 70_000
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 12_800}))
    fail(source, tmp_path / "out", errors.NonFiniteWeightError, r"\(67 such values\)")


def test_too_little_coverage(source: Path, tmp_path: Path) -> None:
    fail(source, tmp_path / "out", errors.CoverageError, "only 82.4 % .* asks for 90 %", min_coverage=0.9)
    fail(source, tmp_path / "out", errors.CoverageError, "only 10.3 % .* 50 %", only=["q_proj"], min_coverage=0.5)


def test_nothing_to_quantize_is_an_error_whatever_the_bar(source: Path, tmp_path: Path) -> None:
    fail(source, tmp_path / "out", errors.CoverageError, "none of the parameters", skip=["*"], min_coverage=0)


def test_unknown_device(source: Path, tmp_path: Path) -> None:
    fail(source, tmp_path / "out", errors.DeviceError, "--device cuda:1", device="cuda:1")
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        int8convert.quantize(source, tmp_path / "out", device="tpu")


def test_directory_without_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of `os.access`, since the tests may run as root, who may write anywhere."""
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    fail(source, tmp_path / "locked" / "out", errors.OutputError, "no permission in '.*locked'")


def test_source_with_the_same_weight_under_two_names(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    tensors = read_tensors(source)
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name.removeprefix("model.")] = tensors[name].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    fail(source, tmp_path / "out", errors.CorruptFileError, "two tensors of the source would both be written")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kept_tensors_that_are_not_finite_are_listed(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    tensors = read_tensors(source)
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.embed_tokens.weight"][1, :2] = torch.tensor([float("inf"), -float("inf")])
    tensors["model.layers.0.input_layernorm.weight"][0] = torch.finfo(dtype).max
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for _ in range(2):  # the second time from what was written down
        report = int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
        assert report.non_finite == {"model.embed_tokens.weight": 2, "model.norm.weight": 1}


def test_kept_tensor_that_becomes_infinite_in_the_dtype_of_the_model_is_listed(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", torch.float16)
    tensors = read_tensors(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    assert report.non_finite == {"model.norm.weight": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_negative_zeros_and_denormals_pass_as_bitsandbytes_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    tensors = read_tensors(source)
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    tensors[names[0]].zero_()
    tensors[names[1]].fill_(-0.0)
    tiny = torch.finfo(dtype).tiny
    tensors[names[2]] *= tiny if dtype is torch.float16 else 16 * tiny
    assert 0 < tensors[names[2]].abs().median() < tiny
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    written = read_tensors(tmp_path / "out")
    for name in names:
        codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(tensors[name])
        assert torch.equal(written[name], codes), name
        assert torch.equal(written[name.removesuffix("weight") + "SCB"], absmax), name
