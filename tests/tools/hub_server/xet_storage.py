"""The bytes of clients that use hf_xet: a store in a local folder, which hf_xet itself reads and writes.

hf_xet takes a `local://` URL for the address of its servers and then works on a folder. What a Hub knows besides, which
xet hash a sha256 has, the client tells real servers in a shard file; here it is read from that file.
Source of the layout: the specification of shards, https://huggingface.co/docs/xet/shard.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_RECORD_BYTES = 48
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30
_LIFETIME_S = 3600


@dataclass(frozen=True)
class XetPointer:
    """What a Hub must say about a file for hf_xet to fetch it."""

    xet_hash: str
    n_bytes: int


class XetStorage:
    """One `local://` store. It needs hf_xet installed, as its clients do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"local://{self._folder}"

    def token_headers(self) -> dict[str, str]:
        return {
            "X-Xet-Cas-Url": self.url,
            "X-Xet-Access-Token": "xet-token",
            "X-Xet-Token-Expiration": str(int(time.time()) + _LIFETIME_S),
        }

    def add(self, path: Path) -> XetPointer:
        """Upload a file, as a client would."""
        import hf_xet  # type: ignore[import-untyped]

        with hf_xet.XetSession().new_upload_commit(
            endpoint=self.url, token="xet-token", token_expiry_unix_secs=int(time.time()) + _LIFETIME_S
        ) as commit:
            upload = commit.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
        return XetPointer(upload.result().xet_info.hash, path.stat().st_size)

    def fetch(self, pointer: XetPointer, to: Path) -> None:
        """Write a file's bytes to `to`, from a copy of the store: a client at work may hold a lock on the store."""
        import hf_xet

        with tempfile.TemporaryDirectory() as scratch:
            copy, partial = Path(scratch, "store"), Path(scratch, "file")
            shutil.copytree(self._folder, copy)
            with hf_xet.XetSession().new_file_download_group(
                endpoint=f"local://{copy}", token="xet-token", token_expiry_unix_secs=int(time.time()) + _LIFETIME_S
            ) as group:
                group.start_download_file(hf_xet.XetFileInfo(pointer.xet_hash, pointer.n_bytes), str(partial))
            landed = to.with_suffix(".xet")
            shutil.copyfile(partial, landed)
            os.replace(landed, to)

    def find(self, sha256: str) -> XetPointer | None:
        """The pointer of the file with that sha256, if its upload was completed."""
        for shard in self._folder.rglob("shards/*.mdb"):
            if pointer := _file_records(shard.read_bytes()).get(sha256):
                return pointer
        return None


def _file_records(shard: bytes) -> dict[str, XetPointer]:
    """sha256 -> pointer of the files one shard describes."""
    found: dict[str, XetPointer] = {}
    position = _RECORD_BYTES
    while position + _RECORD_BYTES <= len(shard):
        file_hash = shard[position : position + 32]
        if file_hash == b"\xff" * 32:
            break
        flags, n_segments = struct.unpack_from("<II", shard, position + 32)
        segments = range(position + _RECORD_BYTES, position + _RECORD_BYTES * (1 + n_segments), _RECORD_BYTES)
        n_bytes = sum(struct.unpack_from("<I", shard, start + 36)[0] for start in segments)
        position += _RECORD_BYTES * (1 + n_segments * (2 if flags & _HAS_VERIFICATION else 1))
        if flags & _HAS_METADATA:
            found[_hash_text(shard[position : position + 32])] = XetPointer(_hash_text(file_hash), n_bytes)
            position += _RECORD_BYTES
    return found


def _hash_text(raw: bytes) -> str:
    """Xet prints a hash as four little-endian 64-bit numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
