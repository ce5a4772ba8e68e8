"""One output shard: header first, tensors in any order, from any thread; there whole under its name, or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from int8convert.checkpoint.atomic import INCOMPLETE_SUFFIX, fsync_directory
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.safetensors_file import encode_safetensors_header
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES


def order_for_alignment(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Wider dtypes first, so that every tensor starts at a multiple of its element's size, as other loaders expect."""
    return dict(sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]))


def planned_shard_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the file `ShardWriter` makes for these tensors, header included."""
    data = sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in tensors.values())
    return len(encode_safetensors_header(dict(tensors))) + data


def _reserve(fd: int, n_bytes: int) -> None:
    """Reserve room for a file; where the file system cannot, at least give it its size."""
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, n_bytes)


class ShardWriter:
    """Writes `path` under a temporary name; only `commit` gives it its own.

    The room is reserved at once, so a full disk shows before the work is done, and blocks written out of order do not
    scatter the file.

    Args:
        path: the shard to write.
        tensors: name -> (dtype, shape), in the order of their bytes.

    Raises:
        OSError: the file cannot be made, or there is no room for it.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + INCOMPLETE_SUFFIX)
        header = encode_safetensors_header(dict(tensors))
        self._begin: dict[str, int] = {}
        at = len(header)
        for name, (dtype, shape) in tensors.items():
            self._begin[name] = at
            at += prod(shape) * DTYPE_BYTES[dtype]
        self.n_bytes = at
        self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _reserve(self._fd, self.n_bytes)
            self._write_at(0, memoryview(header))
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Write a tensor's bytes from byte `at` of it on. Threads may write at the same time."""
        self._write_at(self._begin[name] + at, data)

    def _write_at(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def commit(self) -> str:
        """Put the data on the disk, then give the file its name; the file's sha256 in hex.

        The hash is of what can be read back, and is computed while the disk is busy.
        """
        with ThreadPoolExecutor(1) as background:
            synced = background.submit(os.fsync, self._fd)
            sha256 = file_sha256(self._temporary)
            synced.result()
        os.close(self._fd)
        self._fd = -1
        self._temporary.replace(self._path)
        fsync_directory(self._path.parent)
        return sha256

    def discard(self) -> None:
        """Remove what was written. Harmless after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)
