"""Reads values of a checkpoint as NumPy arrays, and casts them to another dtype.

The casts are written again on purpose, to judge the converter. Shared with the converter is where the bytes are: which
rows of which source tensor make a tensor of the output, decoded from low-bit codes and merged with an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.rows import Scratch, as_array, read_rows
from int8convert.checkpoint.source import SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.conversion.source_rows import SourceRows
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.planning.plan import PlannedTensor

FP16_MAX = 65504.0
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
FLOATS = frozenset({*_NUMPY, "BF16"})


class TensorRows:
    """Reads rows of one tensor of a file. A context manager; each thread has its own."""

    def __init__(self, stored: StoredTensor, shard: SourceShard) -> None:
        self.stored = stored
        self._reader = shard.open()
        self._scratch = Scratch()

    def __enter__(self) -> TensorRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def read(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Return rows as stored: floats as `float_values` takes them, others as unsigned integers."""
        block = read_rows(self.stored, self._reader, begin, end, self._scratch)
        return as_array(self.stored, block, begin, end)


class PlannedRows:
    """Reads the source's rows of a tensor of the output. A context manager.

    Attributes:
        dtype: the source's dtype; F32 if codes were decoded or an adapter merged.
    """

    def __init__(self, planned: PlannedTensor, stored: StoredTensor) -> None:
        self._rows = SourceRows(planned, stored)
        self._reader = planned.shard.open()
        self._scratch = Scratch()
        self.dtype = self._rows.dtype

    def __enter__(self) -> PlannedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Return the row ranges of the blocks, in order; none without elements."""
        return self._rows.ranges() if prod(self._rows.shape) else iter(())

    def read(self, begin: int, end: int) -> npt.NDArray[Any]:
        block = self._rows.read(self._reader, begin, end, self._scratch)
        return self._rows.values(block, begin, end)


def flat(stored: StoredTensor) -> StoredTensor:
    """Return a contiguous tensor as a column, so that no row is too long."""
    return replace(stored, shape=(stored.n_elements,))


def read_all(tensor: PlacedTensor) -> npt.NDArray[Any]:
    """Read a small tensor, flat."""
    stored = flat(tensor.stored) if tensor.stored.strides is None else tensor.stored
    with TensorRows(stored, tensor.shard) as rows:
        return rows.read(0, stored.shape[0]).reshape(-1).copy()


def float_values(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return values in float32, exact except for F64, which is rounded to nearest even.

    Args:
        array: values of `dtype`; BF16 as integers of its 16 bits.
    """
    if dtype == "BF16":
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def cast(array: npt.NDArray[Any], dtype: str, wanted: str) -> npt.NDArray[Any]:
    """Cast float values to another float dtype, rounded once to nearest even; BF16 as integers of its 16 bits.

    torch casts, as in the model's own loader.
    """
    if dtype == wanted:
        return array
    import torch

    source = torch.from_numpy(np.ascontiguousarray(array))
    if dtype == "BF16":
        source = source.view(torch.bfloat16)
    if wanted == "BF16":
        return source.to(torch.bfloat16).view(torch.int16).numpy()
    return source.to(getattr(torch, {"F64": "float64", "F32": "float32", "F16": "float16"}[wanted])).numpy()


def same_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Compare two arrays of one dtype bit by bit: NaN equals NaN, and zero is not minus zero."""
    bits = np.dtype(f"u{one.dtype.itemsize}")
    same: npt.NDArray[np.bool_] = one.view(bits) == other.view(bits)
    return same


def shown(array: npt.NDArray[Any], dtype: str, index: int) -> str:
    value = array.reshape(-1)[index : index + 1]
    return f"{float(float_values(value, dtype)[0]):.7g}" if dtype in FLOATS else f"{value[0]}"
