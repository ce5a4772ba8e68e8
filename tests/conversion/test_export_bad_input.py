"""What cannot be exported gets two lines that say what to do, and leaves nothing behind."""

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
from int8convert.checkpoint.names import MANIFEST_NAME
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.conversion.destination import PublishedDestination
from int8convert.events import Event, PlanMade, ShardFinished, ShardStarted
from int8convert.publish.shard_publisher import HubPublisher
from int8convert.sources import open_source
from tests.conversion.test_export import make_experts, make_int8, read_config
from tests.tools.tiny_models import edit_config, file_bytes, read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

FC1 = "model.decoder.layers.0.fc1"
N_SHARDS = 3


def fail(source: Path, out: Path, error: type[errors.Int8ConvertError], match: str, **options: Any) -> None:
    """The export raises, in two plain lines, and the disk is as before."""
    before = file_bytes(out.parent)
    folders = {path for path in out.parent.rglob("*") if path.is_dir()}
    with pytest.raises(error, match=match) as caught:
        int8convert.export(source, out, **(options or {"format": "compressed-tensors"}))
    for line in (caught.value.message, caught.value.hint):
        assert line and "\n" not in line and not line.endswith(".")
    assert file_bytes(out.parent) == before
    assert {path for path in out.parent.rglob("*") if path.is_dir()} == folders


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    return make_int8(tmp_path)


def merged(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The checkpoint in one file, with something done to its tensors."""
    tensors = read_tensors(source)
    change(tensors)
    for path in source.glob("model*"):
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    return source


def edit_block(source: Path, **changes: Any) -> None:
    edit_config(source, quantization_config={**read_config(source)["quantization_config"], **changes})


def test_16_bit_source(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    fail(source, tmp_path / "out", errors.SourceError, "no int8 checkpoint: its config.json has no quantization_config")


def test_unfinished_conversion(int8: Path, tmp_path: Path) -> None:
    (int8 / "config.json").unlink()
    fail(int8, tmp_path / "out", errors.SourceError, "its config.json is missing")


@pytest.mark.parametrize("method", ["gptq", 8, None, ["bitsandbytes"], "a\x1b[0m"])
def test_other_method(method: Any, int8: Path, tmp_path: Path) -> None:
    edit_block(int8, quant_method=method)
    fail(int8, tmp_path / "out", errors.SourceError, "is quantized by .*, expected bitsandbytes, compressed-tensors")


def test_block_that_is_no_object(int8: Path, tmp_path: Path) -> None:
    edit_config(int8, quantization_config=[1])
    fail(int8, tmp_path / "out", errors.SourceError, "an unnamed method")


@pytest.mark.parametrize("changes", [{"load_in_8bit": False}, {"load_in_4bit": True}, {"load_in_8bit": "yes"}])
def test_bitsandbytes_of_4_bits(changes: Any, int8: Path, tmp_path: Path) -> None:
    edit_block(int8, **changes)
    fail(int8, tmp_path / "out", errors.SourceError, "its weights are not 8-bit")


def group(**changes: Any) -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**int8, "strategy": "channel", "dynamic": False, **changes.pop("weights", {})}
    inputs = {**int8, "strategy": "token", "dynamic": True, **changes.pop("input_activations", {})}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **changes}}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "pack-quantized"}, "format is 'pack-quantized'"),
        ({"format": None}, "format is None"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "key-value cache"),
        ({"config_groups": {}}, "names no config_groups"),
        ({"config_groups": {"W8A8": ["Linear"]}}, "a config group is no object"),
        ({"config_groups": {"group_0": {"targets": []}}}, "has no weights"),
        ({"config_groups": group(weights={"num_bits": 4})}, "num_bits of weights is 4, expected 8"),
        ({"config_groups": group(weights={"type": "float"})}, "type of weights is 'float'"),
        ({"config_groups": group(weights={"symmetric": False})}, "symmetric of weights is False"),
        ({"config_groups": group(weights={"strategy": "group"})}, "strategy of weights is 'group'"),
        ({"config_groups": group(input_activations={"dynamic": False})}, "dynamic of input_activations is False"),
        ({"config_groups": group(output_activations={"num_bits": 8})}, "quantizes output activations"),
    ],
)
def test_compressed_tensors_of_another_kind(changes: Any, match: str, int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ct", format="compressed-tensors")
    edit_block(tmp_path / "ct", **changes)
    fail(tmp_path / "ct", tmp_path / "out", errors.SourceError, match, format="bitsandbytes")


@pytest.mark.parametrize("kind", [None, {}, {"default": "int8_weight_only"}, {"default": {"_type": "Int4"}}, {"a": 1}])
def test_torchao_of_another_kind(kind: Any, int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ao", format="torchao")
    edit_block(tmp_path / "ao", quant_type=kind)
    fail(tmp_path / "ao", tmp_path / "out", errors.SourceError, "quant_type is not one of", format="bitsandbytes")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{FC1}.SCB"), rf"'{FC1}.weight' is int8 and has no '{FC1}.SCB'"),
        (lambda t: t.pop(f"{FC1}.weight"), rf"'{FC1}.SCB' belongs to no int8 weight"),
        (lambda t: t.update({f"{FC1}.weight": torch.ones(128, 64)}), rf"'{FC1}.SCB' belongs to no int8 weight"),
        (lambda t: t.update({f"{FC1}.SCB": torch.ones(64)}), r"F32 \[64\], expected one float for each of 128 rows"),
        (lambda t: t.update({f"{FC1}.SCB": torch.ones(128, 64)}), r"F32 \[128, 64\], expected one float"),
        (lambda t: t.update({f"{FC1}.SCB": torch.ones(128, dtype=torch.int32)}), r"I32 \[128\], expected one float"),
        (lambda t: t.update({f"{FC1}.weight": torch.ones(2, 64, 64, dtype=torch.int8)}), "expected two dimensions"),
        (lambda t: t.update({f"{FC1}.weight": torch.ones(128, 0, dtype=torch.int8)}), "expected two dimensions"),
        (lambda t: t[f"{FC1}.SCB"][5:].fill_(torch.nan), f"'{FC1}.SCB' holds nan at row 5"),
        (lambda t: t[f"{FC1}.SCB"][127:].fill_(torch.inf), f"'{FC1}.SCB' holds inf at row 127"),
        (lambda t: t[f"{FC1}.SCB"][:1].fill_(-1), f"'{FC1}.SCB' holds -1.0 at row 0"),
        (lambda t: t[f"{FC1}.weight_format"].fill_(2), f"'{FC1}.weight_format' is not zero"),
        (lambda t: t.update({"experts.gate_up": torch.ones(2, 4, 4, dtype=torch.int8)}), "'experts.gate_up' belongs"),
        (lambda t: t.update({f"{FC1}.input_scale": torch.ones(1)}), f"'{FC1}.input_scale' belongs to no int8 weight"),
        (lambda t: [t.pop(n) for n in list(t) if "SCB" in n or "format" in n or "fc" in n or "attn" in n], "no int8"),
    ],
)
def test_weight_that_is_not_whole(change: Any, match: str, int8: Path, tmp_path: Path) -> None:
    fail(merged(int8, change), tmp_path / "out", errors.SourceError, match)


def test_codes_that_lie_transposed_in_a_pickle(int8: Path, tmp_path: Path) -> None:
    tensors = read_tensors(int8)
    for path in int8.glob("model*"):
        path.unlink()
    torch.save({**tensors, f"{FC1}.weight": tensors[f"{FC1}.weight"].T.contiguous().T}, int8 / "pytorch_model.bin")
    fail(int8, tmp_path / "out", errors.SourceError, f"'{FC1}.weight' is stored transposed or with gaps")


def test_zero_point_that_is_not_zero(int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ao", format="torchao")
    source = merged(tmp_path / "ao", lambda t: t[f"{FC1}._weight_zero_point"][3].fill_(1))
    fail(source, tmp_path / "out", errors.SourceError, "is not zero: .*that only torchao reads", format="bitsandbytes")


def test_torchao_without_its_header_can_leave_the_format_only(int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ao", format="torchao")
    source = merged(tmp_path / "ao", lambda t: None)
    match = rf"no header describes '{FC1}.weight'"
    fail(source, tmp_path / "out", errors.CorruptFileError, match.replace("fc1", r"[\w.]+"), max_shard_size="1GB")
    int8convert.export(source, tmp_path / "back", format="bitsandbytes")


def test_attribute_of_torchao_that_no_other_has(int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ao", format="torchao")
    source = merged(tmp_path / "ao", lambda t: t.update({f"{FC1}._weight_act_pre_scale": torch.ones(64)}))
    fail(source, tmp_path / "out", errors.SourceError, "_weight_act_pre_scale' belongs to no", format="bitsandbytes")


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao"])
def test_conv1d_has_no_form_elsewhere(format: str, tmp_path: Path) -> None:
    source = make_int8(tmp_path, "gpt2")
    match = f"{format} has no form for Conv1D layers such as 'transformer.h.0.attn.c_attn'"
    fail(source, tmp_path / "out", errors.FormatError, match, format=format)


@pytest.mark.parametrize("format", ["bitsandbytes", "torchao"])
def test_experts_have_no_form_elsewhere(format: str, tmp_path: Path) -> None:
    source = make_experts(tmp_path)
    match = f"{format} cannot hold int8 experts such as 'model.layers.0.mlp.experts.0.up_proj'"
    fail(source, tmp_path / "out", errors.FormatError, match, format=format)


def test_two_tensors_of_one_name(int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "ao", format="torchao")
    source = merged(tmp_path / "ao", lambda t: t.update({f"{FC1}.weight": torch.ones(128, 64)}))
    fail(source, tmp_path / "out", errors.CorruptFileError, f"both be written as '{FC1}.weight'", dequantize="float32")


def test_output_is_the_source(int8: Path) -> None:
    fail(int8, int8, errors.OutputError, "is the source itself")
    fail(int8, int8, errors.OutputError, "is the source itself", format="torchao", overwrite=True)


def test_output_is_there_already(int8: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    fail(int8, tmp_path / "out", errors.OutputError, "exists and is not empty")
    int8convert.export(int8, tmp_path / "done", format="torchao")
    before = file_bytes(tmp_path / "done")
    assert int8convert.export(int8, tmp_path / "done", format="torchao").n_done_shards == N_SHARDS
    assert file_bytes(tmp_path / "done") == before
    fail(int8, tmp_path / "done", errors.OutputError, 'differs: format was "torchao"', format="compressed-tensors")


def test_no_room(int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    match = "needs 10[0-9],[0-9]{3} bytes, its disk has 100,000 free"
    fail(int8, tmp_path / "new" / "out", errors.DiskFullError, match)


@pytest.mark.parametrize("n_writes", [0, 1, 30, 45])
@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_that_fills_up_keeps_finished_shards(
    n_writes: int, overwrite: bool, int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing looks like a checkpoint, not even the one that --overwrite replaces; the same command resumes."""
    out = tmp_path / "new"
    int8convert.export(int8, tmp_path / "expected", format="compressed-tensors")
    if overwrite:
        int8convert.export(int8, out, format="torchao")
    write, left = ShardWriter.write, [n_writes]

    def write_some(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write_some)
        with pytest.raises(errors.DiskFullError) as caught:
            int8convert.export(int8, out, format="compressed-tensors", overwrite=overwrite, workers=1)
    n_kept = len(list(out.glob("*.safetensors")))
    assert n_kept == {0: 0, 1: 0, 30: 1, 45: 2}[n_writes]
    assert ("removed" if n_kept == 0 else f"{n_kept} finished shard") in caught.value.state
    assert out.exists() == (overwrite or n_kept > 0)
    assert not (out / "config.json").exists()
    report = int8convert.export(int8, out, format="compressed-tensors", overwrite=overwrite)
    assert report.n_done_shards == n_kept
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "model.safetensors.index.json", "config.json"])
def test_failure_at_a_small_file_keeps_all_shards(
    name: str, int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (int8 / "tokenizer.json").write_text("{}")
    (int8 / "additional_chat_templates").mkdir()
    (int8 / "additional_chat_templates" / "a.jinja").write_text("")
    int8convert.export(int8, tmp_path / "expected", format="torchao")
    replace = Path.replace

    def replace_unless(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_unless)
        with pytest.raises(errors.OutputError, match=f"{name}' cannot be written") as caught:
            int8convert.export(int8, tmp_path / "out", format="torchao")
    assert caught.value.state == "3 finished shards are kept: the same command resumes after them"
    assert not (tmp_path / "out" / "config.json").exists()
    assert int8convert.export(int8, tmp_path / "out", format="torchao").n_done_shards == N_SHARDS
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_interrupted_export_resumes(int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "expected", format="torchao")

    def interrupt(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == 1:
            raise KeyboardInterrupt

    out = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt):
        int8convert.export(int8, out, format="torchao", on_event=interrupt)
    n_kept = len(list(out.glob("*.safetensors")))  # the third may have been on its way
    assert n_kept >= 2 and not (out / "config.json").exists()
    fail(int8, out, errors.OutputError, "an unfinished conversion that differs", format="compressed-tensors")
    fail(int8, out, errors.OutputError, "an unfinished conversion that differs", dequantize="float16")
    events: list[Event] = []
    report = int8convert.export(int8, out, format="torchao", on_event=events.append)
    assert report.n_done_shards == n_kept
    assert [event.i for event in events if isinstance(event, ShardStarted)] == [2][: N_SHARDS - n_kept]
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_export_of_another_arithmetic_is_not_continued(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, ShardFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        int8convert.export(int8, tmp_path / "out", format="torchao", on_event=interrupt)
    monkeypatch.setattr("int8convert.conversion.export.EXPORT_ARITHMETIC_VERSION", 2)
    differs = "an unfinished conversion that differs: export_arithmetic was 1, is now 2"
    fail(int8, tmp_path / "out", errors.OutputError, differs, format="torchao")


@pytest.mark.parametrize("options", [{"dequantize": "float16"}, {"format": "compressed-tensors"}])
def test_export_of_before_its_version_was_recorded_is_the_same(options: Any, int8: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    int8convert.export(int8, new, **options)
    manifest = json.loads((new / MANIFEST_NAME).read_text())
    assert manifest["conversion"].pop("export_arithmetic") == 1
    (new / MANIFEST_NAME).write_text(json.dumps(manifest))
    shards = {name: content for name, content in file_bytes(new).items() if name.endswith(".safetensors")}

    assert int8convert.export(int8, new, **options).n_done_shards == len(shards)

    assert shards.items() <= file_bytes(new).items()
    assert json.loads((new / MANIFEST_NAME).read_text())["conversion"]["export_arithmetic"] == 1


@pytest.mark.parametrize("options", [{"format": "torchao"}, {"dequantize": "bfloat16"}, {"max_shard_size": "50KB"}])
def test_damaged_shard_of_an_earlier_run_is_made_again(options: Any, int8: Path, tmp_path: Path) -> None:
    int8convert.export(int8, tmp_path / "expected", **options)
    shutil.copytree(tmp_path / "expected", tmp_path / "out")
    shard = tmp_path / "out" / sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    int8convert.export(int8, tmp_path / "out", **options)
    assert shard.read_bytes() == bytes(content)  # of the right size
    int8convert.export(int8, tmp_path / "out", check=True, **options)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_source_that_shrinks_while_it_is_read(int8: Path, tmp_path: Path) -> None:
    def shrink(event: Event) -> None:
        if isinstance(event, PlanMade):
            os.truncate(int8 / "model-00003-of-00003.safetensors", 4000)

    with pytest.raises(errors.CorruptFileError, match="was changed since its header was read") as caught:
        int8convert.export(int8, tmp_path / "out", format="torchao", on_event=shrink)
    assert caught.value.state == "2 finished shards are kept: the same command resumes after them"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing to change"),
        ({"format": "gguf"}, "format must be one of"),
        ({"dequantize": "int8"}, "dequantize must be one of"),
        ({"format": "torchao", "dequantize": "float16"}, "give format or dequantize, not both"),
        ({"max_shard_size": "5 apples"}, "a size must look like"),
        ({"format": "torchao", "workers": 0}, "workers must be at least 1"),
    ],
)
def test_wrong_arguments(options: Any, match: str, int8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        int8convert.export(int8, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_dequantized_export_is_not_published(int8: Path, tmp_path: Path) -> None:
    destination = PublishedDestination(HubPublisher("me/plain"))
    with pytest.raises(ValueError, match="only int8 checkpoints are published"):
        int8convert.export(int8, tmp_path / "out", dequantize="float16", destination=destination)
    assert not (tmp_path / "out").exists()


def test_new_inside_the_checkpoint_that_is_read_is_refused(int8: Path) -> None:
    before = file_bytes(int8).keys()
    for new in (int8 / "new", int8 / "deeper" / "new"):
        with pytest.raises(errors.OutputError, match=r"^NEW '.*new' is inside OUT '") as caught:
            int8convert.export(int8, new, dequantize="float16")
        assert caught.value.hint == "name a directory outside OUT"
    assert file_bytes(int8).keys() == before


READS = [
    ("checked", 1, {"format": "compressed-tensors"}),
    ("counted", 2, {"format": "compressed-tensors"}),
    ("recoded", 3, {"format": "compressed-tensors"}),
    ("copied", 2, {"max_shard_size": "1GB"}),
    ("dequantized", 2, {"dequantize": "float16"}),
]


@pytest.mark.parametrize(("n_reads", "options"), [case[1:] for case in READS], ids=[case[0] for case in READS])
def test_disk_that_fails_where_scales_are_read(
    n_reads: int, options: dict[str, Any], int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(int8, lambda tensors: None)
    (shard,) = open_source(int8).shards
    scale = next(tensor for tensor in shard.tensors if tensor.name == f"{FC1}.SCB")
    read, seen = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == scale.offset and len(buffers[0]) == scale.n_bytes:
            seen.append(offset)
            if len(seen) == n_reads:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    fail(
        int8,
        tmp_path / "out",
        errors.SourceError,
        "^'model.safetensors' of the source cannot be read: Input",
        **options,
    )
    assert len(seen) == n_reads
