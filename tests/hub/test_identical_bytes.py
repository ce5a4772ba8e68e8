"""The same output whichever reader brings it: of experts, after a break at any shard, and wherever OUT is.

`test_readers` has the plainer checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from int8convert.errors import HubConnectionError, SourceError
from int8convert.events import Event, ShardFinished
from tests.conversion.test_experts import build
from tests.tools.fp8_checkpoints import save_fp8
from tests.tools.hub_conversions import READERS, convert
from tests.tools.hub_models import NAME, files_of, opt_66b
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import as_downloaded, save_as_pickles, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

MANIFEST = "int8convert/manifest.json"


def _gpt2_in_one_bin(folder: Path) -> Path:
    """Conv1D: [in, out], of which the transposed is written."""
    return save_as_pickles(save_checkpoint("gpt2", folder / "saved"), folder / "bin", 1)


def _experts(family: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        build(family).save_pretrained(folder / family, max_shard_size="150KB")
        return folder / family

    return save


def _fp8(folder: Path) -> Path:
    """Scales in another shard than their codes."""
    save_fp8(save_checkpoint("llama", folder / "plain", torch.bfloat16), folder / "fp8", "block")
    return folder / "fp8"


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "Conv1D in one bin": _gpt2_in_one_bin,
    "fused experts": _experts("mixtral"),
    "interleaved experts": _experts("gpt_oss"),
    "experts side by side": _experts("dbrx"),
    "FP8": _fp8,
}


def assert_all_agree(hub: Hub, directory: Path, tmp_path: Path, **options: object) -> None:
    hub.add_repo("org/name", files_of(directory))
    streamed, downloaded = (convert("org/name", tmp_path / reader, reader, **options) for reader in READERS)
    local = convert(as_downloaded(directory), tmp_path / "local", **options)
    assert streamed == downloaded
    manifests = [json.loads(files.pop(MANIFEST)) for files in (streamed, local)]
    assert streamed == local
    for manifest in manifests:  # of which source it is, in one word or another
        for key in ("source", "source_revision", "source_card", "conversion"):
            manifest.pop(key, None)
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_stream_download_and_directory_agree(hub: Hub, connect: Connect, tmp_path: Path, kind: str) -> None:
    directory = CHECKPOINTS[kind](tmp_path / "model")
    connect(hub)
    # The format that holds experts as int8.
    options = {"format": "compressed-tensors"} if "experts" in kind else {}
    assert_all_agree(hub, directory, tmp_path, **options)


class _EnoughError(Exception):
    """Ends a conversion from within."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("kind", "max_shard_size"), [("bin", None), ("bin", "400KB"), ("FP8", "50KB")])
def test_conversion_that_ended_at_any_shard_is_resumed_by_the_other_reader(
    hub: Hub, connect: Connect, tmp_path: Path, reader: str, kind: str, max_shard_size: str | None
) -> None:
    """Of FP8 the scales are checked last, so all shards are finished then."""
    hub.add_repo(NAME, files_of(_fp8(tmp_path)) if kind == "FP8" else opt_66b(tmp_path / "model", 5))
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", reader, max_shard_size=max_shard_size)
    n_shards = len([name for name in expected if name.endswith(".safetensors")])
    assert n_shards >= 3
    for i in range(n_shards):

        def end(event: Event, i: int = i) -> None:
            if isinstance(event, ShardFinished) and event.i == i:
                raise _EnoughError

        out = tmp_path / str(i)
        with pytest.raises(_EnoughError):
            convert(NAME, out, reader, end, max_shard_size=max_shard_size)
        other = READERS[1 - READERS.index(reader)]
        assert convert(NAME, out, other, max_shard_size=max_shard_size) == expected, i


def test_conversion_begun_online_is_finished_without_the_network(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    cache = tmp_path / "kept"
    expected = convert(NAME, tmp_path / "online", cache_dir=cache)

    def end(event: Event) -> None:
        if isinstance(event, ShardFinished):
            raise _EnoughError

    with pytest.raises(_EnoughError):
        convert(NAME, tmp_path / "out", "auto", end, cache_dir=cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert convert(NAME, tmp_path / "out", cache_dir=cache) == expected


def test_incomplete_cache_is_an_error_without_the_network(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    cache = tmp_path / "kept"
    convert(NAME, tmp_path / "online", cache_dir=cache)
    next(cache.rglob("pytorch_model-00002*")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(SourceError) as caught:
        convert(NAME, tmp_path / "offline", cache_dir=cache)
    assert caught.value.message == (
        "'pytorch_model.bin.index.json' names shard 'pytorch_model-00002-of-00003.bin', which is not there"
    )
    with pytest.raises(HubConnectionError) as caught_other:
        convert(NAME, tmp_path / "offline", cache_dir=tmp_path / "empty")
    assert caught_other.value.message == "HF_HUB_OFFLINE is set, and 'facebook/opt-66b' is not in the cache"
    assert not (tmp_path / "offline").exists()


def open_files() -> list[str]:
    """Of this process. One that was removed keeps its room on the disk as long as it is open."""
    places = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            places.append(os.readlink(f"/proc/self/fd/{number}"))
    return places


@pytest.mark.parametrize("place", ["as it is", "relative", "behind a link"])
def test_download_keeps_at_most_two_shards_wherever_out_is(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model", 5))
    connect(hub)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    out = {"as it is": tmp_path / "out", "relative": Path("out"), "behind a link": tmp_path / "link" / "out"}[place]
    most = 0

    def count(event: Event) -> None:
        nonlocal most
        removed = [place for place in open_files() if place.endswith(".bin (deleted)")]
        most = max(most, len(list(out.rglob("*.bin"))) + len(set(removed)))

    convert(NAME, out, "download", count, max_shard_size="100MB")
    assert 1 <= most <= 2
