"""Whatever happens to a conversion, the same call completes it, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import int8convert
from int8convert import errors
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.events import Event, ShardFinished, ShardSkipped, ShardStarted
from int8convert.planning.request_difference import first_difference
from tests.tools.options import quantize
from tests.tools.tiny_models import as_downloaded, file_bytes, read_tensors, save_as_pickles, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

N_SHARDS = 7
KILLS = [
    pytest.param(int(os.environ.get("INT8CONVERT_KILLS", "20")), id="few"),
    pytest.param(100, id="many", marks=pytest.mark.slow),
]


def convert(source: Path, out: Path, **options: Any) -> list[Event]:
    """Convert; the events."""
    events: list[Event] = []
    quantize(source, out, **{"on_event": events.append, **options})
    return events


def count(events: list[Event], kind: type) -> int:
    return sum(isinstance(event, kind) for event in events)


def records(out: Path) -> list[Path]:
    return sorted((out / "int8convert" / "shards").glob("*.json"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of seven shards."""
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) == N_SHARDS
    return source


def stop_after(n_shards: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == n_shards - 1:
            raise KeyboardInterrupt

    return on_event


def interrupt(source: Path, out: Path, n_shards: int, **options: Any) -> None:
    """Convert, interrupted when `n_shards` are finished."""
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, on_event=stop_after(n_shards), **options)


def test_interrupt_before_the_first_shard_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        raise KeyboardInterrupt

    before = file_bytes(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        int8convert.quantize(source, tmp_path / "a" / "out", on_event=on_event)
    assert file_bytes(tmp_path) == before and not (tmp_path / "a").exists()


def test_rerun_resumes_behind_the_finished_shards(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "undisturbed")
    interrupt(source, tmp_path / "out", 2)
    n_done = len(records(tmp_path / "out"))
    assert 2 <= n_done <= 3
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").rglob("*.incomplete"))
    events = convert(source, tmp_path / "out")
    assert count(events, ShardSkipped) == n_done
    assert count(events, ShardStarted) == count(events, ShardFinished) == N_SHARDS - n_done
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


def test_report_of_a_resumed_conversion_is_that_of_the_whole(source: Path, tmp_path: Path) -> None:
    whole = int8convert.quantize(source, tmp_path / "whole", on_event=lambda event: None)
    interrupt(source, tmp_path / "out", 3)
    resumed = int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    assert resumed.kept == whole.kept and resumed.coverage == whole.coverage
    for a, b in zip(resumed.errors, whole.errors, strict=True):
        assert (a.layer_kind, a.n_tensors, a.worst_tensor) == (b.layer_kind, b.n_tensors, b.worst_tensor)
        assert a.mean_sqnr_db == pytest.approx(b.mean_sqnr_db, abs=1e-3)


def test_rerun_of_a_finished_conversion_changes_nothing(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    events = convert(source, tmp_path / "out")
    assert count(events, ShardSkipped) == N_SHARDS and count(events, ShardStarted) == 0
    assert file_bytes(tmp_path / "out") == before


def test_missing_or_short_shard_of_a_finished_conversion_is_made_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    shards[1].unlink()
    os.truncate(shards[3], 100)
    events = convert(source, tmp_path / "out")
    assert [event.i for event in events if isinstance(event, ShardFinished)] == [1, 3]
    assert file_bytes(tmp_path / "out") == before


def test_check_finds_a_damaged_shard_of_the_right_size(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = file_bytes(tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert count(convert(source, tmp_path / "out"), ShardSkipped) == N_SHARDS
    events = convert(source, tmp_path / "out", check=True)
    assert [event.i for event in events if isinstance(event, ShardFinished)] == [2]
    assert file_bytes(tmp_path / "out") == before


def test_overwrite_resumes_what_it_began_and_replaces_what_is_finished(source: Path, tmp_path: Path) -> None:
    other = save_checkpoint("llama", tmp_path / "other")
    convert(other, tmp_path / "out")
    interrupt(source, tmp_path / "out", 3, overwrite=True)
    assert count(convert(source, tmp_path / "out", overwrite=True), ShardSkipped) >= 3
    assert count(convert(source, tmp_path / "out", overwrite=True), ShardSkipped) == 0


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"skip": ["fc2"]}, "no --skip then, --skip fc2 now"),
        ({"only": ["fc1"], "min_coverage": 0}, "no --only then, --only fc1 now"),
        ({"threshold": 3}, "--threshold 6.0 then, --threshold 3.0 now"),
        ({"max_shard_size": "20kB"}, "no --max-shard-size then, --max-shard-size 20000 now"),
    ],
)
def test_other_options_are_not_mixed_in(options: dict[str, Any], difference: str, source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    before = file_bytes(tmp_path / "out")
    with pytest.raises(errors.OutputError, match=f"unfinished conversion that differs: {difference}") as caught:
        convert(source, tmp_path / "out", **options)
    assert "--overwrite" in caught.value.hint
    assert file_bytes(tmp_path / "out") == before
    convert(source, tmp_path / "out", overwrite=True, **options)
    convert(source, tmp_path / "fresh", **options)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "fresh")


def test_options_that_change_no_byte_may_change(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    assert count(convert(source, tmp_path / "out", workers=3, min_coverage=0.1), ShardSkipped) >= 2


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("mtime_ns", "the source's file 'model-.*' was changed since, by its time of change"),
        ("n_bytes", r"the source's file 'model-.*' had [\d,]+ bytes, has now [\d,]+"),
        ("header_sha256", "the source's file 'model-.*' holds other tensors now"),
        ("config_sha256", "the source has another config.json now"),
    ],
)
def test_changed_source_is_not_mixed_in(change: str, difference: str, source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    last = sorted(source.glob("*.safetensors"))[-1]
    tensors = read_tensors(source)
    own = {name: tensors[name] for name in list(_names(last))}
    state = last.stat()
    if change == "mtime_ns":
        os.utime(last, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "n_bytes":
        name = next(iter(own))
        save_file({**own, name: torch.cat([own[name], own[name]])}, last, {"format": "pt"})
        os.utime(last, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "header_sha256":
        content = last.read_bytes()
        last.write_bytes(content.replace(b"layers.1.", b"layers.7.", 1))
        index = source / "model.safetensors.index.json"
        names = _names(last)
        moved = json.loads(index.read_text())
        moved["weight_map"] = {k: v for k, v in moved["weight_map"].items() if v != last.name}
        moved["weight_map"].update(dict.fromkeys(names, last.name))
        index.write_text(json.dumps(moved))
        os.utime(last, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "dropout": 0.5}))
    with pytest.raises(errors.OutputError, match=f"that differs: {difference}$"):
        convert(source, tmp_path / "out")


def _names(path: Path) -> list[str]:
    from int8convert.checkpoint.safetensors_file import read_safetensors_header

    return [tensor.name for tensor in read_safetensors_header(path)]


def test_second_process_on_the_same_out_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "int8convert").mkdir(parents=True)
    with (
        DirectoryLock(tmp_path / "out" / "int8convert" / "lock"),
        pytest.raises(errors.OutputError, match=f"is being written by process {os.getpid()}"),
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")


def test_lock_of_a_killed_process_is_gone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "int8convert").mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        DirectoryLock(tmp_path / "out" / "int8convert" / "lock").__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / "out" / "int8convert" / "lock").exists()
    convert(source, tmp_path / "out")


def test_lock_without_flock_names_its_owner(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_flock)
    lock = tmp_path / "out" / "int8convert" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(errors.OutputError, match="process 1 on elsewhere") as caught:
        convert(source, tmp_path / "out")
    assert str(lock) in caught.value.hint
    import socket

    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))  # beyond any process number
    convert(source, tmp_path / "out")


def test_manifest_holds_the_hashes_of_what_was_read_and_written(tmp_path: Path) -> None:
    plain = save_checkpoint("opt", tmp_path / "plain", max_shard_size="60KB")
    for source in (plain, save_as_pickles(plain, tmp_path / "pickles", 2)):
        out = tmp_path / f"{source.name} out"
        convert(as_downloaded(source), out)
        manifest = json.loads((out / "int8convert" / "manifest.json").read_text())
        for shard in manifest["shards"]:
            assert shard["sha256"] == hashlib.sha256((out / shard["file_name"]).read_bytes()).hexdigest()
        read = {name: digest for shard in manifest["shards"] for name, digest in shard["sources"].items()}
        files = [path for path in source.iterdir() if path.suffix in (".safetensors", ".bin")]
        assert read == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        assert {path.name for path in (out / "int8convert").iterdir()} == {"local.json", "manifest.json"}


def test_source_of_which_no_hash_is_known_is_not_hashed(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "int8convert" / "manifest.json").read_text())
    assert [shard["sources"] for shard in manifest["shards"]] == [{}] * len(manifest["shards"])


def test_source_hash_is_right_across_several_output_shards_and_a_resume(tmp_path: Path) -> None:
    source = as_downloaded(save_checkpoint("opt", tmp_path / "source"))
    interrupt(source, tmp_path / "out", 3, max_shard_size="20kB")
    convert(source, tmp_path / "out", max_shard_size="20kB")
    convert(source, tmp_path / "undisturbed", max_shard_size="20kB")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")
    manifest = json.loads((tmp_path / "out" / "int8convert" / "manifest.json").read_text())
    expected = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert [shard["sources"] for shard in manifest["shards"] if shard["sources"]] == [{"model.safetensors": expected}]


def as_in_the_hub_cache(source: Path, folder: Path) -> Path:
    """The layout of the Hugging Face cache: a snapshot of links to blobs named by their sha256."""
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in source.iterdir():
        blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def as_in_a_local_download(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return as_downloaded(folder)


@pytest.mark.parametrize("layout", [as_in_the_hub_cache, as_in_a_local_download])
def test_shard_that_is_not_what_was_fetched_is_refused(
    layout: Callable[[Path, Path], Path], source: Path, tmp_path: Path
) -> None:
    fetched = layout(source, tmp_path / "fetched")
    convert(fetched, tmp_path / "good")
    damaged = sorted(fetched.glob("*.safetensors"))[1].resolve()
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(errors.CorruptFileError, match=r"has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        convert(fetched, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_source_that_vanishes_is_an_error_with_a_way_on(source: Path, tmp_path: Path) -> None:
    shards = sorted(source.glob("*.safetensors"))

    def on_event(event: Event) -> None:
        if isinstance(event, ShardFinished) and event.i == 0:
            shards[-1].rename(tmp_path / "aside")

    with pytest.raises(errors.SourceError, match=f"'{shards[-1].name}' of the source cannot be read"):
        int8convert.quantize(source, tmp_path / "out", on_event=on_event)
    (tmp_path / "aside").rename(shards[-1])
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "undisturbed")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keep_leaves_modules_without_an_int8_form_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source", dtype)
    tensors = read_tensors(source)
    bad = {"model.layers.0.self_attn.q_proj.weight": float("nan"), "model.layers.1.mlp.up_proj.weight": 70000.0}
    for name, value in bad.items():
        tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.NonFiniteWeightError, match="row 3, column 5"):
        convert(source, tmp_path / "out")
    report = int8convert.quantize(source, tmp_path / "out", on_nonfinite="keep", on_event=lambda event: None)
    written = read_tensors(tmp_path / "out")
    for name in bad:
        assert torch.equal(written[name].nan_to_num(), tensors[name].nan_to_num())
    assert ("not finite in int8", 2) in {(kept.reason, kept.n_tensors) for kept in report.kept}
    assert sum(error.n_tensors for error in report.errors) == 12
    assert all(any(repr(name.removesuffix(".weight")) in note for note in report.notes) for name in bad)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"lm_head", *(name.removesuffix(".weight") for name in bad)}
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == expected


CALLS = ("pwrite", "fsync", "posix_fallocate", "replace", "open", "mkdir")


@pytest.mark.parametrize("call", CALLS)
def test_output_call_that_fails_at_any_point_is_survived(
    call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disk full at the n-th call of each kind, for every n until the conversion gets through."""
    convert(source, tmp_path / "undisturbed")
    expected = file_bytes(tmp_path / "undisturbed")
    real = getattr(os, call)
    for n in range(200):
        n_calls = 0

        def full(*args: Any, n: int = n, **kwargs: Any) -> Any:
            nonlocal n_calls
            writes = call != "open" or args[1] & os.O_CREAT
            n_calls += bool(writes)
            if writes and n_calls == n + 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
            return real(*args, **kwargs)

        out = tmp_path / f"out {n}"
        monkeypatch.setattr(os, call, full)
        try:
            convert(source, out)
        except errors.DiskFullError as error:
            assert "\n" not in error.message + error.hint and "no room left" in error.message
            assert not (out / "config.json").exists() or call == "fsync"
        else:
            if n_calls <= n:
                break
        finally:
            monkeypatch.setattr(os, call, real)
        convert(source, out)
        assert file_bytes(out) == expected
        shutil.rmtree(out)
    else:
        pytest.fail("never got through")


def test_data_is_on_the_disk_before_names_and_names_before_what_vouches_for_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        fsync(fd)
        calls.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path / "out")))

    def record_replace(old: Any, new: Any) -> None:
        replace(old, new)
        calls.append(("rename", os.path.relpath(new, tmp_path / "out")))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    convert(source, tmp_path / "out")
    at = {call: i for i, call in enumerate(calls)}
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    manifest, index, config = (
        at["rename", name] for name in ("int8convert/manifest.json", "model.safetensors.index.json", "config.json")
    )
    assert len(shards) == N_SHARDS
    assert manifest < index < config == max(i for (kind, _), i in at.items() if kind == "rename")
    for shard in shards:
        record = f"int8convert/shards/{shard}.json"
        assert at["fsync", f"{shard}.incomplete"] < at["rename", shard] < at["rename", record] < manifest
        between = calls[at["rename", shard] : at["rename", record]]
        assert ("fsync", ".") in between, "the directory is synced before the record says the shard is there"
    for name in (index, config, manifest):
        assert calls[name - 1] == ("fsync", f"{calls[name][1]}.incomplete")


def large_checkpoint(directory: Path) -> Path:
    """Many small shards and one of a single large tensor."""
    import transformers

    depths = {"encoder_layers": 1, "decoder_layers": 11, "encoder_ffn_dim": 1 << 17, "decoder_ffn_dim": 256}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=64, d_model=64, max_position_embeddings=16, **depths, **heads)
    torch.manual_seed(1)
    model = transformers.BartForConditionalGeneration(config).half()
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.mark.parametrize("n_kills", KILLS)
def test_killed_at_any_moment_the_rerun_gives_the_same_bytes(n_kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments, each followed by a rerun to completion."""
    source = large_checkpoint(tmp_path / "source")
    began = time.perf_counter()
    convert(source, tmp_path / "undisturbed", min_coverage=0)
    duration = time.perf_counter() - began
    expected = file_bytes(tmp_path / "undisturbed")
    n_shards = len([name for name in expected if name.endswith(".safetensors")])
    chance = random.Random(0)
    n_resumed = 0
    for _ in range(n_kills):
        out = tmp_path / "out"
        n_before = chance.randint(0, n_shards)
        n_reported = _kill_a_conversion(source, out, n_before, chance.uniform(0, duration / 4))
        n_written_down = len(records(out))
        is_finished = (out / "config.json").exists()
        assert is_finished or n_written_down >= n_reported
        events = convert(source, out, min_coverage=0)
        if not is_finished:
            assert count(events, ShardSkipped) == n_written_down
        n_resumed += count(events, ShardSkipped) > 0 and not is_finished
        assert file_bytes(out) == expected
        shutil.rmtree(out)
    assert n_resumed > n_kills // 5, "too few kills fell between the first and the last shard to mean anything"


def _kill_a_conversion(source: Path, out: Path, n_before: int, delay_s: float) -> int:
    """Start a conversion in a process of its own, and kill it so long after it reported so many finished shards, which
    however busy the machine is falls within it; the number it had reported."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)

        def on_event(event: Event) -> None:
            if isinstance(event, ShardFinished):
                os.write(write_end, b".")

        int8convert.quantize(source, out, int8convert.PlanOptions(min_coverage=0), on_event=on_event)
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        n_reported = len(pipe.read(n_before))
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return n_reported + len(pipe.read())


DIRECTORY = {"config_sha256": "0a", "files": {"a.bin": {"n_bytes": 1, "header_sha256": "0b", "mtime_ns": 17959224}}}
REPOSITORY = {"repository": "facebook/opt-66b", "commit": "7259969061237fe940036d22bea0fd349e4485e9", **DIRECTORY}


@pytest.mark.parametrize(
    ("before", "now", "difference"),
    [
        (REPOSITORY, DIRECTORY, "the source was 'facebook/opt-66b' at '725996906123', is now a directory"),
        (
            REPOSITORY,
            REPOSITORY | {"commit": "1" * 40},
            "the source was 'facebook/opt-66b' at '725996906123', is now 'facebook/opt-66b' at '111111111111'",
        ),
        (DIRECTORY, DIRECTORY | {"files": {}}, "the source's file 'a.bin' is not there any more"),
        (DIRECTORY | {"files": {}}, DIRECTORY, "the source's file 'a.bin' was not there then"),
    ],
)
def test_other_source_is_told_by_its_name(before: dict[str, Any], now: dict[str, Any], difference: str) -> None:
    assert first_difference({"source": before}, {"source": now}) == difference


def test_other_adapter_is_told_by_its_file() -> None:
    before, now = ({"options": {"lora": {"adapter_config.json": sha256}}} for sha256 in ("0a", "0b"))
    assert first_difference(before, now) == "--lora was another: its 'adapter_config.json' differs"
