"""What a header was read from is compared with the file when that comes by, to its last byte."""

from __future__ import annotations

import pytest

from int8convert.hub import header_file
from int8convert.hub.header_file import DigestCheck, HeaderFile
from int8convert.hub.remote_file import HubFile

CONTENT = bytes(range(200))
READ = ((0, 10), (95, 20), (180, 20))
"""Offsets and lengths; the directory of a `.bin` file is at its end."""


class _InMemory(HubFile):
    def read_range(self, begin: int, n_bytes: int) -> bytes:
        return CONTENT[begin : begin + n_bytes]


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 200])
def test_every_byte_that_was_read_is_compared_and_no_other(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(header_file, "_BLOCK_BYTES", 16)
    header = HeaderFile(_InMemory("org/name", "c" * 40, "pytorch_model.bin", len(CONTENT), None, ""))
    for offset, n_bytes in READ:
        header.seek(offset)
        assert header.read(n_bytes) == CONTENT[offset : offset + n_bytes]
    was_read = {at for offset, n_bytes in READ for at in range(offset, offset + n_bytes)}
    for wrong in (None, *range(len(CONTENT))):
        come = bytearray(CONTENT)
        if wrong is not None:
            come[wrong] ^= 1
        check = DigestCheck(header.digests())
        for i in range(0, len(come), piece_bytes):
            check.feed(come[i : i + piece_bytes])
        assert check.matches is (wrong not in was_read), wrong
