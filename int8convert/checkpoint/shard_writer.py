"""Writes one output shard: tensors in any order, from any thread. The file appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from int8convert.checkpoint.atomic import fsync_directory, temporary_path
from int8convert.checkpoint.direct_file import DirectFile
from int8convert.checkpoint.safetensors_file import encode_safetensors_header
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES

_WIDEST = max(DTYPE_BYTES.values())


def order_for_alignment(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensors in an order in which each starts at a multiple of its element's size, as loaders expect.

    Keeps the given order, but moves tensors whose size is no multiple of 8 bytes to the end, then those of no multiple
    of 4, and so on. Nearly all stay where they are, and writing them goes through the file from beginning to end.
    """

    def granularity(spec: tuple[str, tuple[int, ...]]) -> int:
        n_bytes = _n_bytes(spec)
        return min(n_bytes & -n_bytes, _WIDEST) if n_bytes else _WIDEST

    return dict(sorted(tensors.items(), key=lambda item: -granularity(item[1])))


def _n_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return DTYPE_BYTES[dtype] * prod(shape)


def planned_shard_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of the file that `ShardWriter` makes for these tensors, header included."""
    return len(encode_safetensors_header(dict(tensors))) + sum(map(_n_bytes, tensors.values()))


class ShardWriter:
    """Writes a shard under a temporary name. `commit` renames it.

    Args:
        tensors: name -> (dtype, shape), in the order of their bytes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._temporary = temporary_path(path)
        header = encode_safetensors_header(dict(tensors))
        self._begin: dict[str, int] = {}
        at = len(header)
        for name, spec in tensors.items():
            self._begin[name] = at
            at += _n_bytes(spec)
        self.n_bytes = at
        self._sha256 = ""
        self._file = DirectFile(self._temporary, at)
        try:
            self._file.write(0, memoryview(header))
        except BaseException:
            self._file.discard()
            raise

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Write a tensor's bytes from byte `at` of it on. Threads may write at the same time."""
        self._file.write(self._begin[name] + at, data)

    def finish(self) -> None:
        """Put the data on the disk under the temporary name. Call it after all writes."""
        if not self._sha256:
            self._sha256 = self._file.finish()

    def commit(self) -> str:
        """Put the data on the disk, rename the file, and return its sha256 in hex."""
        self.finish()
        self._temporary.replace(self._path)
        fsync_directory(self._path.parent)
        return self._sha256

    def discard(self) -> None:
        """Remove what was written. Harmless after `commit`."""
        self._file.discard()
        self._temporary.unlink(missing_ok=True)
