"""A file on the Hub as a seekable binary file, for its header. What was read is remembered as digests.

The Hub knows no hash of a range, so a header may arrive with wrong bytes. A `RangeDigest` holds the hash of each range
that was read; it is compared when the whole file arrives, whose sha256 the Hub knows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from int8convert.hub.remote_file import HubFile

_BLOCK_BYTES = 1 << 16
"""Bytes per request. Most headers fit into the first block, and the directory of a `.bin` file into the last."""


@dataclass(frozen=True, slots=True)
class RangeDigest:
    """The sha256 of the bytes from `begin` to `end` of a file, as they were read."""

    begin: int
    end: int
    sha256: bytes


class HeaderFile(io.RawIOBase):
    """A read-only file whose blocks are fetched on demand, and kept."""

    def __init__(self, file: HubFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0
        self._blocks: dict[int, bytes] = {}
        self._ranges: list[tuple[int, int]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.n_bytes)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        n = max(0, min(len(buffer), self._file.n_bytes - self._at))
        if n:
            self._fetch(self._at // _BLOCK_BYTES, (self._at + n - 1) // _BLOCK_BYTES)
            self._ranges.append((self._at, self._at + n))
            buffer[:n] = self._content(self._at, self._at + n)
            self._at += n
        return n

    def _fetch(self, first: int, last: int) -> None:
        """Fetch the missing blocks, each run of neighbours by one request."""
        missing = [index for index in range(first, last + 1) if index not in self._blocks]
        for begin, end in _united((index, index + 1) for index in missing):
            offset = begin * _BLOCK_BYTES
            content = self._file.read_range(offset, min(end * _BLOCK_BYTES, self._file.n_bytes) - offset)
            for index in range(begin, end):
                at = (index - begin) * _BLOCK_BYTES
                self._blocks[index] = content[at : at + _BLOCK_BYTES]

    def digests(self) -> tuple[RangeDigest, ...]:
        """Return the digests of all that was read, in order. Bytes that were fetched and not read are not covered."""
        return tuple(
            RangeDigest(begin, end, hashlib.sha256(self._content(begin, end)).digest())
            for begin, end in _united(self._ranges)
        )

    def _content(self, begin: int, end: int) -> bytes:
        first, last = begin // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES
        blocks = b"".join(self._blocks[index] for index in range(first, last + 1))
        return blocks[begin - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]


def _united(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Unite ranges that touch or overlap; yield them in order."""
    united: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if united and begin <= united[-1][1]:
            united[-1] = united[-1][0], max(end, united[-1][1])
        elif begin < end:
            united.append((begin, end))
    yield from united


class DigestCheck:
    """Compares a file's bytes, fed in order and without gaps, with digests."""

    def __init__(self, digests: Iterable[RangeDigest]) -> None:
        self._pending = list(digests)[::-1]
        self._hash = hashlib.sha256()
        self._at = 0
        self.matches = True

    def feed(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        end = self._at + len(view)
        while self._pending and self._pending[-1].begin < end:
            digest = self._pending[-1]
            self._hash.update(view[max(0, digest.begin - self._at) : digest.end - self._at])
            if digest.end > end:
                break
            self.matches &= self._hash.digest() == digest.sha256
            self._hash = hashlib.sha256()
            self._pending.pop()
        self._at = end
