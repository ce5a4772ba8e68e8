"""The rows of a planned tensor as numbers, whatever form the source stores them in."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import NUMPY_DTYPE, convert_floats, widen
from int8convert.checkpoint.rows import GATHERED_BYTES, Block, Scratch, as_array, read_rows, row_ranges
from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.coding import Decoder
from int8convert.decoding.fp8 import FP8_DTYPES, Fp8Cast
from int8convert.planning.plan import PlannedTensor

_DECODED_BYTES = 4 << 20
"""Bytes of float32 weights that a block of codes becomes. More leave the cache."""


def values_dtype(tensor: PlannedTensor) -> str:
    """Return the dtype of the values that `SourceRows` returns."""
    is_decoded = tensor.coding or tensor.source.dtype in FP8_DTYPES
    return "F32" if is_decoded or tensor.lora or tensor.fold else tensor.source.dtype


class SourceRows:
    """The rows of a planned tensor as numbers: codes decoded, an adapter merged, a rotation folded, all in float32.

    Args:
        stored: the tensor as it is read; None takes the planned one, of which this may be another view.

    Attributes:
        shape: that of the numbers.
        dtype: that of the numbers.
    """

    def __init__(self, tensor: PlannedTensor, stored: StoredTensor | None = None) -> None:
        self._stored = stored or tensor.source
        self._coding = tensor.coding
        self.shape = self._coding.weight_shape(self._stored.shape) if self._coding else self._stored.shape
        self._row_block = tensor.row_block
        self._rounds_to = tensor.rounds_to
        self._decoder: Decoder | None = tensor.coding.open() if tensor.coding else None
        if self._decoder is None and self._stored.dtype in FP8_DTYPES:
            self._decoder = Fp8Cast(self._stored.dtype)
        self._lora = tensor.lora.load() if tensor.lora else None
        if self._lora and tensor.lora and tensor.lora.is_transposed and not tensor.is_quantized:
            self._lora = self._lora.transposed()
        self._fold = tensor.fold.load() if tensor.fold else None
        self.dtype = values_dtype(tensor)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Return the row range of each block, in order; whole blocks of a fold."""
        if self._coding is None:
            return row_ranges(self._stored, self._row_block)
        n_rows, multiple = self.shape[0], self._row_block
        _, n_code_rows = next(row_ranges(self._stored))
        # A stream holds no more than a block of codes for each thread.
        step = n_code_rows * n_rows // max(1, self._code_rows(0, n_rows)[1])
        step = min(step, decoded_bytes(self._stored) // max(1, 4 * prod(self.shape[1:])))
        step = max(1, step // multiple) * multiple
        return ((begin, min(begin + step, n_rows)) for begin in range(0, max(1, n_rows), step))

    def read(self, reader: ShardReader, begin: int, end: int, scratch: Scratch) -> Block:
        """Read the bytes of the rows from `begin` to before `end`."""
        return read_rows(self._stored, reader, *self._code_rows(begin, end), scratch)

    def values(self, block: Block, begin: int, end: int) -> npt.NDArray[Any]:
        """Return the rows of a block that was read, C-contiguous, of `dtype`."""
        rows = as_array(self._stored, block, *self._code_rows(begin, end))
        if self._decoder:
            rows = self._rounded(self._decoder.decode(rows, begin)[: end - begin])
        elif self._lora or self._fold:
            rows = widen(rows, self._stored.dtype)
        rows = self._lora.merge(rows, begin) if self._lora else rows
        return self._fold.apply(rows, begin) if self._fold else rows

    def _rounded(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return decoded values rounded to the dtype that the user asked for, in float32 again."""
        if self._rounds_to is None:
            return values
        narrow = convert_floats(np.ascontiguousarray(values).reshape(-1).view(np.uint8), "F32", self._rounds_to)
        return widen(narrow.view(NUMPY_DTYPE[self._rounds_to]), self._rounds_to).reshape(values.shape)

    def _code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return self._coding.code_rows(begin, end) if self._coding else (begin, end)


def decoded_bytes(stored: StoredTensor) -> int:
    """Return the bytes of float32 weights that a block of codes may become, if a row is not larger."""
    return _DECODED_BYTES if stored.strides is None else GATHERED_BYTES
