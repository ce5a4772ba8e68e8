"""A file of a tree as the Hub's API describes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools.hub_server.blobs import Blobs, KnownFile

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".model")
LFS_FROM_BYTES = 10_000_000


@dataclass(frozen=True)
class FileEntry:
    """A file of a tree. `blob_oid` is git's, for a file in LFS that of its pointer."""

    sha256: str
    n_bytes: int
    blob_oid: str
    is_lfs: bool
    pointer_bytes: int = 0
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        """What identifies the content: git's id, or for LFS the sha256."""
        return self.sha256 if self.is_lfs else self.blob_oid

    def described(self, path: str) -> dict[str, Any]:
        """The entry of `tree` and `paths-info`."""
        shown: dict[str, Any] = {"type": "file", "oid": self.blob_oid, "size": self.n_bytes, "path": path}
        if self.is_lfs:
            shown["lfs"] = {"oid": self.sha256, "size": self.n_bytes, "pointerSize": self.pointer_bytes}
        if self.xet_hash:
            shown["xetHash"] = self.xet_hash
        return shown

    def sibling(self, path: str) -> dict[str, Any]:
        """The entry of `siblings` with `?blobs=true`."""
        shown: dict[str, Any] = {"rfilename": path, "blobId": self.blob_oid, "size": self.n_bytes}
        if self.is_lfs:
            shown["lfs"] = {"sha256": self.sha256, "size": self.n_bytes, "pointerSize": self.pointer_bytes}
        return shown


def is_for_lfs(path: str, n_bytes: int) -> bool:
    """Whether a Hub keeps a file in LFS: by its name, as the usual .gitattributes say, or by its size."""
    return n_bytes > 0 and (path.endswith(LFS_SUFFIXES) or n_bytes > LFS_FROM_BYTES)


def regular_entry(blobs: Blobs, data: bytes) -> FileEntry:
    """Store a file of git itself."""
    return FileEntry(blobs.add(data), len(data), _git_oid(data), is_lfs=False)


def lfs_entry(blobs: Blobs, sha256: str, n_bytes: int) -> FileEntry:
    """The entry of a file in LFS whose bytes are there already, over HTTP or in xet.

    Raises:
        KeyError: they are not.
    """
    pointer = blobs.xet_pointer(sha256)
    if pointer is None and not blobs.has(sha256):
        raise KeyError(sha256)
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {n_bytes}\n".encode()
    return FileEntry(sha256, n_bytes, _git_oid(text), True, len(text), pointer.xet_hash if pointer else None)


def added_entry(blobs: Blobs, path: str, content: bytes | Path | KnownFile) -> FileEntry:
    """Store a file that a test puts into a repository, where a Hub would have put it."""
    if isinstance(content, bytes) and not is_for_lfs(path, len(content)):
        return regular_entry(blobs, content)
    if isinstance(content, Path) and not is_for_lfs(path, content.stat().st_size):
        return regular_entry(blobs, content.read_bytes())
    sha256 = blobs.add(content)
    if not isinstance(content, KnownFile):
        blobs.copy_to_xet(sha256)
    return lfs_entry(blobs, sha256, blobs.path(sha256).stat().st_size)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
