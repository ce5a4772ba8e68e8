"""What a running command takes, looked at again and again."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

_PERIOD_S = 0.004
_BLOCK_BYTES = 512
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


class Sampler:
    """A context manager, for its thread.

    Args:
        pid: of the command; its children count, too.
        folders: what it writes to.

    Attributes:
        disk_bytes: most that lay in the folders at a time, files that were removed and are still open included.
        anonymous_bytes: most anonymous memory of all processes together.
    """

    def __init__(self, pid: int, folders: Sequence[Path]) -> None:
        self._pid, self._folders = pid, folders
        self.disk_bytes = self.anonymous_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._is_over.wait(_PERIOD_S):
            pids = list(_family(self._pid))
            removed = sum(_removed_bytes(pid, self._folders) for pid in pids)
            self.disk_bytes = max(self.disk_bytes, sum(map(disk_bytes, self._folders)) + removed)
            self.anonymous_bytes = max(self.anonymous_bytes, sum(map(_anonymous_bytes, pids)))


def disk_bytes(folder: Path) -> int:
    """What the files under a folder take."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(where, name)).st_blocks * _BLOCK_BYTES
    return total


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _family(int(child))


def _anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        found = _ANONYMOUS.search(Path(f"/proc/{pid}/status").read_text())
        return 1024 * int(found[1]) if found else 0
    return 0


def _removed_bytes(pid: int, folders: Sequence[Path]) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                place = os.readlink(f"/proc/{pid}/fd/{number}")
                if place.endswith(" (deleted)") and any(place.startswith(str(folder)) for folder in folders):
                    total += os.stat(f"/proc/{pid}/fd/{number}").st_blocks * _BLOCK_BYTES
    return total
