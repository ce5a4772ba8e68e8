"""Streamed, downloaded, or from a directory: the same output, whatever the checkpoint is like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from int8convert.conversion.events import Event, ShardFinished
from int8convert.errors import HubConnectionError, SourceError
from tests.conversion.test_experts import build
from tests.conversion.test_fp8 import save_fp8
from tests.hub.conversions import READERS, convert
from tests.hub.models import NAME, Files, files_of, opt_66b, save_opt
from tests.hub_server.fixtures import Connect
from tests.hub_server.http_messages import Origin
from tests.hub_server.hub import Hub
from tests.tiny_models import save_as_pickles, save_checkpoint

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
    "safetensors shards": lambda folder: save_opt(folder / "saved", max_shard_size="300KB"),
    "one safetensors": lambda folder: save_checkpoint("qwen3", folder / "saved"),
    "one bin": lambda folder: save_as_pickles(save_opt(folder / "saved"), folder / "bin", 1),
    "bin shards": lambda folder: save_as_pickles(save_opt(folder / "saved"), folder / "bin", 4),
    "Conv1D": lambda folder: save_checkpoint("gpt2", folder / "saved"),
    "Conv1D in one bin": _gpt2_in_one_bin,
    "fused experts": _experts("mixtral"),
    "interleaved experts": _experts("gpt_oss"),
    "experts side by side": _experts("dbrx"),
    "FP8": _fp8,
}


def assert_all_agree(hub: Hub, directory: Path, tmp_path: Path, **options: object) -> None:
    hub.add_repo("org/name", files_of(directory))
    streamed, downloaded = (convert("org/name", tmp_path / reader, reader, **options) for reader in READERS)
    local = convert(directory, tmp_path / "local", **options)
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


@pytest.mark.parametrize("size", ["60KB", "700KB", "100MB"])
def test_output_shards_smaller_and_larger_than_the_source_s_agree(
    hub: Hub, connect: Connect, tmp_path: Path, size: str
) -> None:
    directory = save_as_pickles(save_opt(tmp_path / "saved"), tmp_path / "bin", 5)
    connect(hub)
    assert_all_agree(hub, directory, tmp_path, max_shard_size=size)


class _EnoughError(Exception):
    """Ends a conversion from within."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("max_shard_size", [None, "400KB"])
def test_conversion_that_ended_at_any_shard_is_resumed_by_the_other_reader(
    hub: Hub, connect: Connect, tmp_path: Path, reader: str, max_shard_size: str | None
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model", 5))
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


def test_only_the_files_that_are_needed_are_fetched(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    """Of a repository with everything in it: safetensors, and not `.bin`, `.msgpack`, `.h5` or what is in folders."""
    directory = save_opt(tmp_path / "saved", max_shard_size="300KB")
    files: Files = opt_66b(tmp_path / "model") | files_of(directory)
    hub.add_repo(NAME, files)
    connect(hub)
    for reader in READERS:
        hub.log.clear()
        convert(NAME, tmp_path / reader, reader)
        tree = hub.repo(NAME).find("main").tree
        asked = {request.path.rpartition("/")[2] for request in hub.log.requests(origin=Origin.STORAGE)}
        assert asked == {entry.sha256 for name, entry in tree.items() if name.endswith(".safetensors")}


def test_bin_shards_are_fetched_where_there_is_nothing_better(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    convert(NAME, tmp_path / "out", "stream")
    tree = hub.repo(NAME).find("main").tree
    asked = {request.path.rpartition("/")[2] for request in hub.log.requests(origin=Origin.STORAGE)}
    assert asked == {entry.sha256 for name, entry in tree.items() if name.endswith(".bin")}


def test_download_by_xet_gives_the_same_bytes(xet_hub: Hub, connect: Connect, tmp_path: Path) -> None:
    directory = save_opt(tmp_path / "saved", max_shard_size="300KB")
    xet_hub.add_repo("org/name", files_of(directory))
    connect(xet_hub)
    expected = convert("org/name", tmp_path / "by http", "download")
    connect(xet_hub, xet=True)
    xet_hub.log.clear()

    assert convert("org/name", tmp_path / "by xet", "download") == expected

    assert xet_hub.log.requests("GET", "/xet-read-token/")
    ranges = [request.range for request in xet_hub.log.requests("GET", "/objects/", Origin.STORAGE)]
    assert all(ranges), "only headers come by HTTP"


def test_shards_in_the_cache_of_the_client_are_read_there_and_stay(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    api = connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", "stream")
    cached = [Path(api.hf_hub_download(NAME, f"pytorch_model-0000{i}-of-00003.bin")) for i in (1, 3)]
    before = [path.read_bytes() for path in cached]
    hub.log.clear()

    assert convert(NAME, tmp_path / "out", "download") == expected

    assert [path.read_bytes() for path in cached] == before
    whole = [request for request in hub.log.requests("GET", "/objects/") if request.range is None]
    tree = hub.repo(NAME).find("main").tree
    assert [request.path[-64:] for request in whole] == [tree["pytorch_model-00002-of-00003.bin"].sha256]


def test_cache_dir_keeps_what_was_downloaded_and_serves_the_next_conversion(
    hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    expected = convert(NAME, tmp_path / "undisturbed", "stream")
    cache = tmp_path / "kept"
    assert convert(NAME, tmp_path / "first", cache_dir=cache) == expected
    sizes = {path.name: path.stat().st_size for path in cache.rglob("*.bin")}
    assert len(sizes) == 3
    hub.log.clear()

    assert convert(NAME, tmp_path / "second", cache_dir=cache) == expected

    assert not [request for request in hub.log.requests("GET", "/objects/") if request.range is None]
    assert {path.name: path.stat().st_size for path in cache.rglob("*.bin")} == sizes


def test_full_cache_serves_without_the_network(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub)
    expected = convert(NAME, tmp_path / "online", cache_dir=tmp_path / "kept")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()

    files = convert(NAME, tmp_path / "offline", cache_dir=tmp_path / "kept")

    assert not hub.log.requests()
    assert {name: data for name, data in files.items() if name != MANIFEST} == {
        name: data for name, data in expected.items() if name != MANIFEST
    }


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
        most = max(most, len(list(out.rglob("*.bin"))))

    convert(NAME, out, "download", count, max_shard_size="100MB")
    assert 1 <= most <= 2
