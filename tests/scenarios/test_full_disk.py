"""A disk that fills up: a real one, small, at many fill points; the rerun completes with the same bytes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import int8convert
from int8convert import errors
from tests.tools.tiny_models import file_bytes, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

DISK_BYTES = 1 << 20
N_FILL_POINTS = 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint("opt", tmp_path / "source", max_shard_size="30KB")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here; the file size limit below stands in")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def convert(source: Path, out: Path) -> None:
    int8convert.quantize(source, out, on_event=lambda event: None)


def no_reservation(fd: int, offset: int, n_bytes: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("can_reserve", [True, False])
def test_disk_full_at_every_fill_point_is_survived(
    can_reserve: bool, source: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty fill points with room reserved for each shard, thirty where the writes themselves fail."""
    convert(source, tmp_path / "undisturbed")
    expected = file_bytes(tmp_path / "undisturbed")
    needed = sum(len(content) for content in expected.values())
    # The room seen at the start is a lie: other programs write too.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    if not can_reserve:
        monkeypatch.setattr(os, "posix_fallocate", no_reservation)
    n_full = 0
    for i in range(N_FILL_POINTS):
        filler, out = small_disk / "filler", small_disk / "out"
        free = int(needed * (i + 0.5) / N_FILL_POINTS)
        filler.write_bytes(bytes(DISK_BYTES - 8192 - free))
        try:
            convert(source, out)
        except errors.DiskFullError as error:
            n_full += 1
            assert "make room" in error.hint
            assert not (out / "config.json").exists() and not list(small_disk.rglob("*.incomplete"))
        filler.unlink()
        convert(source, out)
        assert file_bytes(out) == expected
        shutil.rmtree(out)
    assert n_full >= N_FILL_POINTS * 2 // 3


def test_file_size_limit_at_every_size_is_survived(source: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, for where mounting is not permitted: any file may hit it, the first shard or the manifest."""
    convert(source, tmp_path / "undisturbed")
    expected = file_bytes(tmp_path / "undisturbed")
    largest = max(len(content) for content in expected.values())
    for i in range(N_FILL_POINTS):
        out = tmp_path / "out"
        assert _convert_with_limit(source, out, largest * i // N_FILL_POINTS) == 7
        assert not (out / "config.json").exists() and not list(tmp_path.rglob("*.incomplete"))
        convert(source, out)
        assert file_bytes(out) == expected
        shutil.rmtree(out)


def _convert_with_limit(source: Path, out: Path, n_bytes: int) -> int:
    """The exit code of a process that converts under the limit: 7 for a full disk."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        try:
            convert(source, out)
        except errors.DiskFullError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_file_system_that_cannot_reserve_room_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "reserved")
    monkeypatch.setattr(os, "posix_fallocate", no_reservation)
    convert(source, tmp_path / "not reserved")
    assert file_bytes(tmp_path / "reserved") == file_bytes(tmp_path / "not reserved")
