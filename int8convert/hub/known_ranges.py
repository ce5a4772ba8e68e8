"""Small parts of a shard that are needed before it goes by, such as the scales of FP8 codes that come before them.

The Hub knows no hash of a part. So what was made of one counts only when the whole file, whose hash it knows, has gone
by with the same bytes in that place; whoever brings the file asks for `evidence`, and forgets what was wrong.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from int8convert.hub.header_file import Evidence
from int8convert.hub.remote_file import HubFile

_FETCHES_AT_ONCE = 8
_LARGEST_GAP = 1 << 16
"""Bytes in between that cost less than another request."""


class KnownRanges:
    """Parts of one file, in memory. For several threads."""

    def __init__(self) -> None:
        self._content: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def fetch(self, file: HubFile, ranges: Iterable[tuple[int, int]]) -> None:
        """Get what is not known yet.

        Args:
            ranges: first byte, and one behind the last.
        """
        wanted = sorted({(begin, end) for begin, end in ranges if begin < end and begin not in self._content})
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            for parts in pool.map(lambda run: _fetch_run(file, run), _runs(wanted)):
                with self._lock:
                    self._content.update(parts)

    def read_into(self, buffer: memoryview, offset: int) -> bool:
        """Fill the buffer, if the range was fetched as it is asked for."""
        with self._lock:
            found = self._content.get(offset, b"")
        if len(found) != len(buffer):
            return False
        buffer[:] = found
        return True

    def comes_again(self, file: HubFile, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether what is known is the same when it is fetched once more; if not, all is forgotten."""
        for begin, end in ranges:
            if begin < end and self._content.get(begin) != file.read_range(begin, end - begin):
                self.forget()
                return False
        return True

    def evidence(self) -> tuple[Evidence, ...]:
        """Of what is known, in order."""
        with self._lock:
            known = sorted(self._content.items())
        return tuple(Evidence(begin, begin + len(data), hashlib.sha256(data).digest()) for begin, data in known)

    def forget(self) -> None:
        """It was wrong."""
        with self._lock:
            self._content.clear()


def _fetch_run(file: HubFile, run: list[tuple[int, int]]) -> dict[int, bytes]:
    first, end = run[0][0], max(end for _, end in run)
    data = file.read_range(first, end - first)
    return {begin: data[begin - first : end - first] for begin, end in run}


def _runs(ranges: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Neighbours together."""
    runs: list[list[tuple[int, int]]] = []
    for begin, end in ranges:
        if runs and begin - runs[-1][-1][1] <= _LARGEST_GAP:
            runs[-1].append((begin, end))
        else:
            runs.append([(begin, end)])
    return runs
