"""Blocks of rows of a stored tensor: their ranges, how they are read, and how they become a contiguous array.

A row is everything at one index of the first dimension. Rows of a contiguous tensor are one read. A matrix that is
stored otherwise - transposed, or one of several interleaved - is read run by run, so that its memory is a block's and
not the tensor's. Other strided tensors, which are small, are read with all that lies among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor

BLOCK_BYTES = 1 << 20
"""Source bytes a thread handles at a time. Larger ones leave the cache, smaller ones pay more for each system call."""

GATHERED_BYTES = 16 << 20
"""The same for a transposed matrix, of which a block of rows is a short run in every one of its columns."""

_SKIPPED_BYTES = 4096
"""Reading over a gap of a page is cheaper than another system call."""


class Scratch:
    """Buffers and quantizer of one thread. The buffers are reused for every block, and grow for a longer row."""

    def __init__(self) -> None:
        self._source = self._empty(BLOCK_BYTES)
        self._codes = self._empty(BLOCK_BYTES)

    def source(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        if self._source.size < n_bytes:
            self._source = self._empty(n_bytes)
        return self._source[:n_bytes]

    def codes(self, n: int) -> npt.NDArray[np.int8]:
        if self._codes.size < n:
            self._codes = self._empty(n)
        return self._codes[:n].view(np.int8)

    def row_quantize(
        self,
        bits: npt.NDArray[Any],
        codes: npt.NDArray[np.int8],
        absmax: npt.NDArray[np.float32],
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
    ) -> None:
        cpu.row_quantize(bits, codes, absmax, signal, noise)

    def _empty(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        return np.empty(n_bytes, np.uint8)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows as they were read.

    Attributes:
        data: uint8, valid until the thread's next block.
        offset: of its first byte in the file; None if it was gathered from several places.
        run_step: elements from one run to the next in `data`.
    """

    data: npt.NDArray[np.uint8]
    offset: int | None
    run_step: int = 0


def row_ranges(stored: StoredTensor, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the row range of each block, in order; one empty range for a tensor without elements.

    Args:
        multiple: rows that stay together, for which a block may become larger.
    """
    n_rows = stored.shape[0]
    step = max(1, _rows_in_a_block(stored) // multiple) * multiple
    return ((begin, min(begin + step, n_rows)) for begin in range(0, max(1, n_rows), step))


def _rows_in_a_block(stored: StoredTensor) -> int:
    item_bytes = DTYPE_BYTES[stored.dtype]
    if stored.strides is None:
        return BLOCK_BYTES // max(1, item_bytes * prod(stored.shape[1:]))
    if len(stored.shape) != 2:
        return stored.shape[0]
    row_stride, column_stride = stored.strides
    if column_stride <= row_stride:
        return BLOCK_BYTES // max(1, item_bytes * ((stored.shape[1] - 1) * column_stride + 1))
    return GATHERED_BYTES // max(1, item_bytes * stored.shape[1] * max(1, row_stride))


def largest_block_bytes(stored: StoredTensor) -> int:
    """Return the bytes that the largest block takes while it becomes an array, gaps among its elements included."""
    if stored.strides is None:
        return max(BLOCK_BYTES, stored.n_bytes // max(1, stored.shape[0]) if stored.shape else 0)
    return 3 * GATHERED_BYTES if len(stored.shape) == 2 else stored.span_bytes + 2 * stored.n_bytes


def read_rows(stored: StoredTensor, reader: ShardReader, begin: int, end: int, scratch: Scratch) -> Block:
    """Read the rows from `begin` up to `end`, without `end`."""
    item_bytes = DTYPE_BYTES[stored.dtype]
    if stored.strides is None:
        row_bytes = item_bytes * prod(stored.shape[1:])
        return _read_run(reader, stored.offset + begin * row_bytes, (end - begin) * row_bytes, scratch)
    if len(stored.shape) != 2:
        return _read_run(reader, stored.offset, stored.span_bytes, scratch)
    n_runs, step, run = _runs(stored, begin, end)
    first = stored.offset + begin * stored.strides[0] * item_bytes
    if step * item_bytes <= run * item_bytes + _SKIPPED_BYTES:
        span = _read_run(reader, first, ((n_runs - 1) * step + run) * item_bytes, scratch)
        return Block(span.data, first, step)
    data = scratch.source(n_runs * run * item_bytes)
    for i, target in enumerate(data.reshape(n_runs, -1)):
        reader.read_into(target.data, first + i * step * item_bytes)
    return Block(data, None, run)


def _read_run(reader: ShardReader, offset: int, n_bytes: int, scratch: Scratch) -> Block:
    data = scratch.source(n_bytes)
    reader.read_into(data.data, offset)
    return Block(data, offset)


def _runs(stored: StoredTensor, begin: int, end: int) -> tuple[int, int, int]:
    """Return the number of runs in a block of a strided matrix, their distance and their length, in elements."""
    assert stored.strides is not None
    row_stride, column_stride = stored.strides
    n_rows, n_columns = end - begin, stored.shape[1]
    if column_stride <= row_stride:
        return n_rows, row_stride, (n_columns - 1) * column_stride + 1
    return n_columns, column_stride, (n_rows - 1) * row_stride + 1


def as_array(stored: StoredTensor, block: Block, begin: int, end: int) -> npt.NDArray[Any]:
    """Return the rows as a C-contiguous array [end - begin, ...]: a view of the block where possible, else a copy.

    Float values as `NUMPY_DTYPE` holds them, all others as unsigned integers of their width.
    """
    dtype = NUMPY_DTYPE.get(stored.dtype, np.dtype(f"u{DTYPE_BYTES[stored.dtype]}"))
    elements = block.data.view(dtype)
    shape = (end - begin, *stored.shape[1:])
    if stored.strides is None:
        return elements.reshape(shape)
    strides = stored.strides
    if len(shape) == 2:
        row_stride, column_stride = strides
        by_rows = column_stride <= row_stride
        strides = (block.run_step, column_stride) if by_rows else (row_stride, block.run_step)
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(elements, shape, in_bytes))


def read_whole(stored: StoredTensor, reader: ShardReader) -> npt.NDArray[Any]:
    """Return all rows of a small tensor, as `as_array` does."""
    flat = replace(stored, shape=(stored.n_elements,)) if stored.strides is None else stored
    block = read_rows(flat, reader, 0, flat.shape[0], Scratch())
    return as_array(flat, block, 0, flat.shape[0]).reshape(stored.shape)
