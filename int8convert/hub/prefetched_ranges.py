"""Small parts of a shard that are needed before the shard arrives, such as the scales of FP8 codes.

The Hub knows no hash of a part. What was made of one counts only once the whole file, whose hash the Hub knows, has
arrived with the same bytes in that place: `digests` are compared then, and `forget` drops wrong parts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from int8convert.hub.header_file import RangeDigest
from int8convert.hub.remote_file import HubFile

_N_CONNECTIONS = 8
_MAX_GAP = 1 << 16
"""Bytes between two ranges that cost less than another request."""


class PrefetchedRanges:
    """Parts of one file, in memory. Thread-safe. A range is a pair of its first byte and the byte after its last."""

    def __init__(self) -> None:
        self._content: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def fetch(self, file: HubFile, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch the ranges that are not here yet."""
        missing = sorted({(begin, end) for begin, end in ranges if begin < end and begin not in self._content})
        with ThreadPoolExecutor(_N_CONNECTIONS) as pool:
            for parts in pool.map(lambda run: _fetch_run(file, run), _runs(missing)):
                with self._lock:
                    self._content.update(parts)

    def read_into(self, buffer: memoryview, offset: int) -> bool:
        """Fill the buffer if exactly this range was fetched; return whether it was."""
        with self._lock:
            found = self._content.get(offset, b"")
        if len(found) != len(buffer):
            return False
        buffer[:] = found
        return True

    def refetch_matches(self, file: HubFile, ranges: Iterable[tuple[int, int]]) -> bool:
        """Fetch ranges again and return whether they are the same. If one differs, forget all."""
        for begin, end in ranges:
            if begin < end and self._content.get(begin) != file.read_range(begin, end - begin):
                self.forget()
                return False
        return True

    def digests(self) -> tuple[RangeDigest, ...]:
        """Return the digests of all ranges, in order."""
        with self._lock:
            ranges = sorted(self._content.items())
        return tuple(RangeDigest(begin, begin + len(data), hashlib.sha256(data).digest()) for begin, data in ranges)

    def forget(self) -> None:
        with self._lock:
            self._content.clear()


def _fetch_run(file: HubFile, run: list[tuple[int, int]]) -> dict[int, bytes]:
    first, end = run[0][0], max(end for _, end in run)
    data = file.read_range(first, end - first)
    return {begin: data[begin - first : end - first] for begin, end in run}


def _runs(ranges: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group sorted ranges whose gaps are small."""
    runs: list[list[tuple[int, int]]] = []
    for begin, end in ranges:
        if runs and begin - runs[-1][-1][1] <= _MAX_GAP:
            runs[-1].append((begin, end))
        else:
            runs.append([(begin, end)])
    return runs
