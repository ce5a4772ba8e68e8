"""A zip archive as torch writes it, read more strictly than the zipfile module reads it."""

from __future__ import annotations

import struct
from typing import BinaryIO

from int8convert.checkpoint.pickle.values import MAX_PICKLE_BYTES, RefusedError
from int8convert.text import quoted

_ALIGNMENT = 64
"""Alignment of a record's data in bytes, as torch has written it since 1.6."""

_DESCRIPTOR_BYTES = (0, 16, 24)
"""Bytes that may follow a record's data: none, or its checksum and sizes again, in 32 or 64 bits."""


class ZipArchive:
    """A zip archive as torch writes it: nothing compressed or encrypted, no comment at the end, no name twice.

    Stricter than the zipfile module, so that there is one way to read a file and no record can surprise.

    Source: .ZIP File Format Specification (APPNOTE 6.3), sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
    """

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        begin, n_bytes, n_records = self._find_directory(file_bytes)
        if n_bytes > MAX_PICKLE_BYTES:
            raise RefusedError(f"its zip directory takes {n_bytes:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
        self._directory_begin = begin
        self._records: dict[bytes, tuple[int, int]] = {}
        directory = self._read_at(begin, n_bytes)
        at = 0
        while at < n_bytes:
            at = self._add_record(directory, at)
        if at != n_bytes or len(self._records) != n_records:
            raise RefusedError("its zip directory is damaged")
        starts = sorted({header_at for header_at, _ in self._records.values()})
        self._behind = dict(zip(starts, [*starts[1:], begin], strict=True))
        # torch, too, takes the folder of the first record for that of all.
        self._folder = next(iter(self._records), b"").partition(b"/")[0] + b"/"

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise RefusedError("its zip directory is truncated")
        return data

    def _find_directory(self, file_bytes: int) -> tuple[int, int, int]:
        """Return offset and size of the list of records, and their number."""
        end = file_bytes - 22
        signature, *_, n_records, n_bytes, begin, comment = struct.unpack("<4s4H2LH", self._read_at(max(0, end), 22))
        if signature != b"PK\5\6" or comment:
            raise RefusedError("it does not end with a zip directory: truncated")
        if n_records == 0xFFFF or n_bytes == 0xFFFFFFFF or begin == 0xFFFFFFFF:
            signature, _, end, _ = struct.unpack("<4sLQL", self._read_at(max(0, end - 20), 20))
            if signature != b"PK\6\7" or end > file_bytes:
                raise RefusedError("its zip directory is nowhere to be found")
            signature, *_, n_records, n_bytes, begin = struct.unpack("<4sQ2H2L4Q", self._read_at(end, 56))
            if signature != b"PK\6\6":
                raise RefusedError("its zip directory is nowhere to be found")
        if begin + n_bytes > end:
            raise RefusedError("its zip directory reaches beyond its end")
        return begin, n_bytes, n_records

    def _add_record(self, directory: bytes, at: int) -> int:
        """Add the record whose entry begins at `at`; return where the next begins."""
        fixed = directory[at : at + 46]
        if len(fixed) < 46 or fixed[:4] != b"PK\1\2":
            raise RefusedError("its zip directory is damaged")
        flags, method = struct.unpack_from("<2H", fixed, 8)
        stored_bytes, n_bytes, n_name, n_extra, n_comment = struct.unpack_from("<2L3H", fixed, 20)
        header_at = int.from_bytes(fixed[42:46], "little")
        name = directory[at + 46 : at + 46 + n_name]
        extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
        if 0xFFFFFFFF in (stored_bytes, n_bytes, header_at):
            n_bytes, stored_bytes, header_at = _wide_numbers(extra, [n_bytes, stored_bytes, header_at])
        shown = quoted(name.decode(errors="replace"))
        if flags & 1 or method != 0 or stored_bytes != n_bytes or header_at + 30 + n_bytes > self._directory_begin:
            raise RefusedError(f"the record {shown} is encrypted, compressed or truncated")
        if name in self._records:
            raise RefusedError(f"the record {shown} occurs twice")
        self._records[name] = (header_at, n_bytes)
        return at + int(46 + n_name + n_extra + n_comment)

    def has(self, name: str) -> bool:
        return self._folder + name.encode(errors="replace") in self._records

    def find(self, name: str) -> tuple[int, int]:
        """Return offset and size of a record's bytes."""
        full_name = self._folder + name.encode(errors="replace")
        if full_name not in self._records:
            raise RefusedError(f"the record {quoted(name)} is not there")
        header_at, n_bytes = self._records[full_name]
        header = self._read_at(header_at, 30 + len(full_name))
        flags, method = struct.unpack_from("<2H", header, 6)
        n_name, n_extra = struct.unpack_from("<2H", header, 26)
        begin = header_at + 30 + n_name + n_extra
        if header[:4] != b"PK\3\4" or header[30:] != full_name or n_name != len(full_name) or flags & 1 or method != 0:
            raise RefusedError(f"the record {quoted(name)} is not what the zip directory says")
        if begin + n_bytes > self._directory_begin:
            raise RefusedError(f"the record {quoted(name)} is truncated")
        return begin, n_bytes

    def find_unread(self, name: str) -> tuple[int, int]:
        """As `find`, without reading what stands before the data where the directory leaves no doubt.

        torch pads that so that the data begins at a multiple of 64 bytes: the first one at which this is possible. If
        the data then ends where the next record begins, it begins there; otherwise `find` reads.
        """
        full_name = self._folder + name.encode(errors="replace")
        if full_name not in self._records:
            return self.find(name)
        header_at, n_bytes = self._records[full_name]
        is_wide = [n_bytes >= 0xFFFFFFFF] * 2 + [header_at >= 0xFFFFFFFF]
        # An extra field of kind 1 for numbers that need 64 bits, and one of padding, each with 4 bytes before it.
        least = header_at + 30 + len(full_name) + 4 + (4 + 8 * sum(is_wide) if any(is_wide) else 0)
        begin = -(-least // _ALIGNMENT) * _ALIGNMENT
        return (begin, n_bytes) if self._behind[header_at] - begin - n_bytes in _DESCRIPTOR_BYTES else self.find(name)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of a small record."""
        begin, n_bytes = self.find(name)
        if n_bytes > max_bytes:
            raise RefusedError(f"the record {quoted(name)} takes {n_bytes:,} bytes, expected at most {max_bytes:,}")
        return self._read_at(begin, n_bytes)


def _wide_numbers(extra: bytes, narrow: list[int]) -> list[int]:
    """Numbers of a zip entry, those that did not fit 32 bits taken from its extra field of kind 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + n_bytes]
            wide = iter([int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)])
            numbers = [next(wide, -1) if number == 0xFFFFFFFF else number for number in narrow]
            if min(numbers) >= 0:
                return numbers
        at += 4 + n_bytes
    raise RefusedError("its zip directory lacks a 64-bit number")
