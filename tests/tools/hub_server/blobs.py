"""The bytes of every file, by sha256."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.tools.hub_server.xet_storage import XetPointer, XetStorage

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class KnownFile:
    """A file whose sha256 is taken on trust: hashing a sparse file of 10 GB would take as long as reading one."""

    path: Path
    sha256: str


class Blobs:
    """Content-addressed files in one folder, and files of the test's own that are served where they lie.

    It does not copy a `Path` it is given: that file must not change while the server runs.
    """

    def __init__(self, folder: Path, xet: XetStorage | None) -> None:
        self._folder, self._xet = folder, xet
        self._elsewhere: dict[str, Path] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, content: bytes | Path | KnownFile) -> str:
        """Keep a file's bytes. Returns: its sha256, in hex."""
        if isinstance(content, bytes):
            sha256 = hashlib.sha256(content).hexdigest()
            self.receive(sha256, [content])
            return sha256
        known = content if isinstance(content, KnownFile) else KnownFile(content, file_sha256(content))
        self._elsewhere[known.sha256] = known.path
        return known.sha256

    def receive(self, sha256: str, chunks: Iterable[bytes]) -> bool:
        """Store `chunks` if their sha256 is the one said. A cut leaves nothing. Returns: whether it was."""
        partial = self._folder / f"{sha256}.{threading.get_ident()}.partial"
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                return False
            os.replace(partial, self._folder / sha256)
            return True
        finally:
            partial.unlink(missing_ok=True)

    def receive_part(self, sha256: str, number: int, chunks: Iterable[bytes]) -> str:
        """Store one part of a multipart upload. Returns: its etag."""
        digest = hashlib.sha256()
        with self._part(sha256, number).open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()[:32]

    def join_parts(self, sha256: str, numbers: Iterable[int]) -> bool:
        """Make a blob of its parts. Returns: whether they are all there and have that sha256."""
        parts = [self._part(sha256, number) for number in numbers]
        if not all(part.exists() for part in parts):
            return False
        joined = self.receive(sha256, (part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        return joined

    def copy_to_xet(self, sha256: str) -> None:
        """Give the bytes to the xet store too, if the server has one."""
        if self._xet is not None:
            self._xet.add(self.path(sha256))

    def xet_pointer(self, sha256: str) -> XetPointer | None:
        """How hf_xet finds the bytes, if the server has a xet store and they are in it."""
        return self._xet.find(sha256) if self._xet is not None else None

    def has(self, sha256: str) -> bool:
        """Whether the bytes came over HTTP or lie with the test; those in xet are `XetStorage`'s to know."""
        return sha256 in self._elsewhere or (self._folder / sha256).exists()

    def forget(self, sha256: str) -> None:
        """Have it sent anew by whoever needs it; of what was uploaded over HTTP."""
        (self._folder / sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """The file with these bytes; what only xet has is fetched from it first.

        Raises:
            KeyError: nobody ever uploaded them.
        """
        with self._lock:
            if sha256 in self._elsewhere:
                return self._elsewhere[sha256]
            path = self._folder / sha256
            if not path.exists():
                if self._xet is None or (pointer := self._xet.find(sha256)) is None:
                    raise KeyError(sha256)
                self._xet.fetch(pointer, path)
            return path

    def _part(self, sha256: str, number: int) -> Path:
        return self._folder / f"{sha256}.part{number:05d}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
