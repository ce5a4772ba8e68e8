"""Whatever the order, the threads and the file system: the bytes and their hash are right, and memory stays small."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from int8convert.checkpoint import direct_file
from int8convert.checkpoint.direct_file import CHUNK_BYTES, MAX_FULL, DirectFile
from int8convert.checkpoint.hashing import OrderedSha256
from int8convert.checkpoint.shard_writer import order_for_alignment


def pieces(n_bytes: int, chance: random.Random, largest: int) -> list[tuple[int, int]]:
    """A file cut into pieces of random sizes."""
    found = []
    at = 0
    while at < n_bytes:
        end = min(n_bytes, at + chance.randint(1, largest))
        found.append((at, end))
        at = end
    return found


@pytest.mark.parametrize("n_bytes", [1, 4095, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, 5 * CHUNK_BYTES + 12345])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_pieces_in_any_order_make_the_file(n_bytes: int, n_threads: int, tmp_path: Path) -> None:
    chance = random.Random(n_bytes)
    data = chance.randbytes(n_bytes)
    todo = pieces(n_bytes, chance, max(1, n_bytes // 7))
    chance.shuffle(todo)
    file = DirectFile(tmp_path / "x", n_bytes)

    def work() -> None:
        while True:
            try:
                begin, end = todo.pop()
            except IndexError:
                return
            file.write(begin, memoryview(data)[begin:end])

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.finish() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data


def test_hash_that_falls_behind_is_caught_up_with_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_made = 0
    make = direct_file._Chunk

    def counting() -> Any:
        nonlocal n_made
        n_made += 1
        return make()

    monkeypatch.setattr(direct_file, "_Chunk", counting)
    n_chunks = 5 * MAX_FULL
    data = random.Random(0).randbytes(n_chunks * CHUNK_BYTES)
    file = DirectFile(tmp_path / "x", len(data))
    for i in (*range(1, n_chunks), 0):
        begin = i * CHUNK_BYTES
        file.write(begin, memoryview(data)[begin : begin + CHUNK_BYTES])
    assert file.finish() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data
    assert n_made <= MAX_FULL + 2


def test_threads_wait_for_a_slow_hash_and_nothing_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = OrderedSha256.feed

    def slow_feed(self: OrderedSha256, data: memoryview, offset: int) -> None:
        time.sleep(0.002)
        feed(self, data, offset)

    monkeypatch.setattr(OrderedSha256, "feed", slow_feed)
    monkeypatch.setattr("int8convert.checkpoint.hashing.read_exactly", lambda *_: pytest.fail("read back"))
    n_chunks = 5 * MAX_FULL
    data = random.Random(0).randbytes(n_chunks * CHUNK_BYTES)
    file = DirectFile(tmp_path / "x", len(data))
    begins = iter(range(0, len(data), CHUNK_BYTES))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                begin = next(begins, None)
            if begin is None:
                return
            file.write(begin, memoryview(data)[begin : begin + CHUNK_BYTES])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.finish() == hashlib.sha256(data).hexdigest()


def test_data_goes_past_the_page_cache_where_the_file_system_lets_it(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system knows no direct writes")
    file = DirectFile(tmp_path / "x", 10)
    assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    file.discard()


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_file_system_without_direct_writes_gets_ordinary_ones(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some refuse at opening, some only at writing."""
    real = getattr(os, call)
    n_refused = 0

    def refuse(first: Any, *arguments: Any) -> Any:
        nonlocal n_refused
        flags = arguments[0] if call == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            n_refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, *arguments)

    monkeypatch.setattr(os, call, refuse)
    file = DirectFile(tmp_path / "x", 3 * CHUNK_BYTES + 1)
    data = random.Random(0).randbytes(3 * CHUNK_BYTES + 1)
    file.write(0, memoryview(data))
    assert file.finish() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data and n_refused == 1


def test_threads_that_compute_wait_for_a_slow_disk_only_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    pwrite = os.pwrite

    def slow_pwrite(*arguments: Any) -> int:
        assert may_write.wait(60)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    data = random.Random(0).randbytes((MAX_FULL + 3) * CHUNK_BYTES)
    n_room = MAX_FULL * CHUNK_BYTES
    file = DirectFile(tmp_path / "x", len(data))
    file.write(0, memoryview(data)[:n_room])  # would wait here forever
    rest = threading.Thread(target=file.write, args=(n_room, memoryview(data)[n_room:]))
    rest.start()
    rest.join(0.1)
    assert rest.is_alive(), "a chunk was taken for which there is no room"
    may_write.set()
    rest.join()
    assert file.finish() == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("failing", [0, 20])
def test_failure_of_the_disk_reaches_the_caller(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    n_chunks = 21

    def broken_pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset == failing * CHUNK_BYTES:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", broken_pwrite)
    file = DirectFile(tmp_path / "x", n_chunks * CHUNK_BYTES)
    with pytest.raises(OSError, match="Input/output error"):
        for i in range(n_chunks):
            file.write(i * CHUNK_BYTES, memoryview(bytes(CHUNK_BYTES)))
        file.finish()
    file.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [0, 5, 3 * CHUNK_BYTES])
def test_missing_bytes_are_noticed(missing: int, tmp_path: Path) -> None:
    n_bytes = 3 * CHUNK_BYTES + 1
    file = DirectFile(tmp_path / "x", n_bytes)
    data = memoryview(bytes(n_bytes))
    file.write(0, data[:missing])
    file.write(missing + 1, data[missing + 1 :])
    with pytest.raises(ValueError, match="not every byte"):
        file.finish()
    file.discard()
    assert not list(tmp_path.iterdir())


def test_no_room_is_seen_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space|too large|too big"):
        DirectFile(tmp_path / "x", 1 << 60)
    assert not list(tmp_path.iterdir())


def test_every_tensor_starts_at_a_multiple_of_its_element_and_most_stay_in_order() -> None:
    chance = random.Random(0)
    sizes = {"I8": 1, "U8": 1, "F16": 2, "F32": 4, "F64": 8}
    specs = {f"odd {i}": (chance.choice(list(sizes)), (chance.randint(0, 9), chance.randint(1, 9))) for i in range(500)}
    specs |= {f"even {i}": (chance.choice(list(sizes)), (8, i)) for i in range(50)}
    at = 0
    ordered = order_for_alignment(specs)
    for dtype, (rows, columns) in ordered.values():
        assert at % sizes[dtype] == 0
        at += rows * columns * sizes[dtype]
    assert [name for name in ordered if name.startswith("even")] == [name for name in specs if name.startswith("even")]
    assert dict(ordered) == specs
