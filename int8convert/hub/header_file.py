"""A file on the Hub as a binary file to be read here and there, for its header; what was read is remembered as hashes.

The Hub knows no hash of a range, so a header could come with wrong bytes unnoticed. `Evidence` holds the hash of each
range a header was read from; it is compared when the whole file comes by, whose sha256 the Hub does know.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from int8convert.hub.remote_file import HubFile

_BLOCK_BYTES = 1 << 16
"""Most headers are in the first one; the directory of a `.bin` file is in the last."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a range of a file was when it was read.

    Attributes:
        begin, end: the range, in bytes.
        sha256: of its content.
    """

    begin: int
    end: int
    sha256: bytes


class HeaderFile(io.RawIOBase):
    """A read-only file whose blocks are fetched when they are asked for, and kept."""

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
        first, last = self._at // _BLOCK_BYTES, (self._at + n - 1) // _BLOCK_BYTES
        self._fetch(first, last)
        self._ranges.append((self._at, self._at + n))
        done = 0
        for index in range(first, last + 1) if n else ():
            begin = self._at + done - index * _BLOCK_BYTES
            part = self._blocks[index][begin : begin + n - done]
            buffer[done : done + len(part)] = part
            done += len(part)
        self._at += n
        return n

    def _fetch(self, first: int, last: int) -> None:
        """Get the blocks that are missing, neighbours by one request."""
        missing = [index for index in range(first, last + 1) if index not in self._blocks]
        for begin, end in _runs(missing):
            offset = begin * _BLOCK_BYTES
            content = self._file.read_range(offset, min(end * _BLOCK_BYTES, self._file.n_bytes) - offset)
            for index in range(begin, end):
                at = (index - begin) * _BLOCK_BYTES
                self._blocks[index] = content[at : at + _BLOCK_BYTES]

    def evidence(self) -> tuple[Evidence, ...]:
        """Of everything that was read, in order; not of what came along, which nothing was made of."""
        return tuple(
            Evidence(begin, end, hashlib.sha256(self._content(begin, end)).digest())
            for begin, end in _united(self._ranges)
        )

    def _content(self, begin: int, end: int) -> bytes:
        first, last = begin // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES
        blocks = b"".join(self._blocks[index] for index in range(first, last + 1))
        return blocks[begin - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in ranges that lie apart, in order."""
    united: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if united and begin <= united[-1][1]:
            united[-1] = united[-1][0], max(end, united[-1][1])
        elif begin < end:
            united.append((begin, end))
    return united


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring numbers as ranges: first, and one behind the last."""
    begin = end = -1
    for number in numbers:
        if number != end:
            if begin >= 0:
                yield begin, end
            begin = number
        end = number + 1
    if begin >= 0:
        yield begin, end


class EvidenceCheck:
    """Sees a file's bytes pass, in order and without gaps, and whether they are what the evidence says."""

    def __init__(self, evidence: Iterable[Evidence]) -> None:
        self._waiting = list(evidence)[::-1]
        self._hash = hashlib.sha256()
        self._at = 0
        self.is_kept = True

    def feed(self, data: bytes | memoryview) -> None:
        """The file's next bytes."""
        view = memoryview(data)
        end = self._at + len(view)
        while self._waiting and self._waiting[-1].begin < end:
            one = self._waiting[-1]
            self._hash.update(view[max(0, one.begin - self._at) : one.end - self._at])
            if one.end > end:
                break
            self.is_kept &= self._hash.digest() == one.sha256
            self._hash = hashlib.sha256()
            self._waiting.pop()
        self._at = end


def as_binary_file(file: HeaderFile) -> BinaryIO:
    """With a `read` that gives all that is asked for."""
    return io.BufferedReader(file, 4096)
