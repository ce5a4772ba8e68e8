"""Trouble of this machine and of its caches, and how long other trouble is borne, by each reader."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from int8convert.errors import DiskFullError, OutputError
from int8convert.events import ShardRepeated
from int8convert.hub import download
from int8convert.hub.open_repository import open_repository
from int8convert.hub.stream import ShardStream
from tests.tools.hub_repositories import NAME, add, convert, opt_pickles
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process", "small_pieces", "quick_waits")


def test_stream_that_is_closed_ends_its_thread_though_it_waits_for_room(
    hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    """A new stream is made for every shard that came wrong; the old ones must let go of their windows."""
    add(hub, save_checkpoint("opt", tmp_path / "source"))
    connect(hub)
    shards = open_repository(NAME).shards
    stream = ShardStream(shards, [0], 4096)
    stream.read_into(shards[0], memoryview(bytearray(4096)), 0)

    stream.close()

    assert not stream._thread.is_alive()


def test_stream_holds_no_memory_but_its_window(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, save_checkpoint("opt", tmp_path / "source"))
    connect(hub)
    held: list[tuple[int, int]] = []
    take = ShardStream._take

    def counting(self: ShardStream, *arguments: object) -> None:
        take(self, *arguments)  # type: ignore[arg-type]
        held.append((self._n_used + len(self._free), self._max_chunks))

    monkeypatch.setattr(ShardStream, "_take", counting)
    convert(NAME, tmp_path / "out", reader="stream")
    assert all(n_held <= most for n_held, most in held)


def test_wrong_file_in_a_cache_dir_is_fetched_again_into_it(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "right", cache_dir=tmp_path / "kept")
    cached = next((tmp_path / "kept").rglob("pytorch_model-00002-of-00003.bin"))
    right = cached.read_bytes()
    content = bytearray(right)
    content[-9000] ^= 1
    cached.resolve().write_bytes(content)

    convert(NAME, tmp_path / "out", cache_dir=tmp_path / "kept")

    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")
    assert cached.read_bytes() == right


def test_retries_of_a_stream_are_counted_from_its_last_byte(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty cuts, each soon after the last: longer in all than the retry budget, but never without a byte."""
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    convert(NAME, tmp_path / "right", reader="stream")
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "0.4")
    hub.faults.add(FaultKind.CUT, origin=Origin.STORAGE, nth=7, times=40, after_bytes=1000)

    convert(NAME, tmp_path / "out", reader="stream")

    assert len(hub.faults.fired) == 40
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")


def test_retries_of_a_download_are_counted_from_its_last_byte(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    download_file, tries = download.download_file, itertools.count(1)

    def failing(*arguments: Any, on_bytes: Callable[[int], None], **options: Any) -> Path:
        n = next(tries)
        if n <= 40:
            on_bytes(n)
            raise OSError("the file is shorter than expected")
        return download_file(*arguments, on_bytes=on_bytes, **options)

    monkeypatch.setattr(download, "download_file", failing)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "0.4")
    convert(NAME, tmp_path / "out", reader="download")
    assert next(tries) == 40 + 3 + 1


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, DiskFullError, r"no room left in '.*/out/int8convert/incoming/\d+' while downloading 'pytorch"),
        (errno.EACCES, OutputError, r"'.*/incoming/\d+' cannot be written: Permission denied"),
    ],
)
def test_trouble_of_this_disk_is_not_the_network_s(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type, message: str
) -> None:
    add(hub, opt_pickles(tmp_path))
    connect(hub)
    tries = itertools.count()

    def failing(*arguments: Any, **options: Any) -> Path:
        next(tries)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(download, "download_file", failing)
    with pytest.raises(OutputError, match=message) as caught:
        convert(NAME, tmp_path / "out", reader="download")
    assert type(caught.value) is kind
    assert next(tries) <= 3, "it was tried again"


@pytest.mark.parametrize("reader", ["stream", "download"])
def test_weights_outside_of_lfs_are_compared_by_git_s_hash(
    hub: Hub, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """The Hub knows no sha256 of them."""
    monkeypatch.setattr("tests.tools.hub_server.file_entries.LFS_SUFFIXES", ())
    add(hub, save_checkpoint("opt", tmp_path / "source"))
    connect(hub)
    convert(NAME, tmp_path / "right", reader=reader)
    shutil.rmtree(tmp_path / "client")
    hub.log.clear()
    hub.faults.add(FaultKind.WRONG_BYTES, method="GET", path="/resolve-cache/.*safetensors$", nth=2, seed=1)

    events = convert(NAME, tmp_path / "out", reader=reader)

    assert [event for event in events if isinstance(event, ShardRepeated)]
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")


def test_file_in_the_cache_that_is_too_short_is_not_read(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    add(hub, opt_pickles(tmp_path))
    api = connect(hub)
    convert(NAME, tmp_path / "right", reader="stream")
    cached = Path(api.hf_hub_download(NAME, "pytorch_model-00002-of-00003.bin")).resolve()
    cached.write_bytes(cached.read_bytes()[:-5000])

    events = convert(NAME, tmp_path / "out", reader="download")

    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "right")
    assert not [event for event in events if type(event).__name__ == "ShardRepeated"]
