"""sha256 of files that are read in blocks anyway, by one read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from int8convert.checkpoint.file_reader import FileIdentity, open_unchanged
from int8convert.checkpoint.safetensors_file import read_exactly
from int8convert.trace import span

CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class OrderedSha256:
    """The sha256 of a whole file, from blocks fed in the order of their offsets.

    The class reads bytes between the blocks itself, and ignores bytes that were fed before. Not thread-safe.

    Args:
        identity: what the file must be, from here to `finish`; None takes any.
    """

    def __init__(self, path: Path, identity: FileIdentity | None = None) -> None:
        self._path = path
        self._identity = identity
        self._fd = open_unchanged(path, identity)
        self._n_bytes = os.fstat(self._fd).st_size
        self._hash = hashlib.sha256()
        self._at = 0

    def feed(self, data: memoryview, offset: int) -> None:
        """Add the file's bytes from `offset` on."""
        self._catch_up(offset)
        fresh = data[self._at - offset :]
        with span("hash", len(fresh)):
            self._hash.update(fresh)
        self._at += len(fresh)

    def finish(self) -> str:
        """Read the rest of the file and return the digest in hex; raises as the class does."""
        self._catch_up(self._n_bytes)
        if self._identity is not None:
            self._identity.check(self._fd, self._path.name)
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _catch_up(self, offset: int) -> None:
        buffer = bytearray(min(CHUNK_BYTES, max(0, offset - self._at)))
        while self._at < offset:
            part = memoryview(buffer)[: offset - self._at]
            read_exactly(self._fd, part, self._at, self._path.name)
            with span("hash", len(part)):
                self._hash.update(part)
            self._at += len(part)


def file_sha256(path: Path, identity: FileIdentity | None = None) -> str:
    """Return the sha256 of a file in hex; raises as `OrderedSha256`, if an identity is given."""
    return OrderedSha256(path, identity).finish()


def json_sha256(value: Any) -> str:
    """Return the sha256 of a JSON value in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def expected_sha256(path: Path) -> str | None:
    """Return the sha256 that the Hugging Face client recorded for a downloaded file; None if it recorded none.

    In the cache a file is a link to a blob named by its hash; in a local directory the hash stands in a metadata file.
    """
    if path.is_symlink():
        name = os.readlink(path).rpartition("/")[2]
        return name if _SHA256.fullmatch(name) else None
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if metadata.is_file() and metadata.stat().st_size < CHUNK_BYTES:
        lines = metadata.read_text(errors="replace").split()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return lines[1]
    return None
