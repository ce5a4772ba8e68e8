"""Tokens to int8 codes, and the columns that stay as they are; see `reference.activation_quantize`.

1. Outlier columns are found by the maximum of their bit patterns over all tokens, unless `capacity` is 0.
2. Each block of a token is read twice, the second time from the core's own cache: first for its largest pattern, then
   for its codes. A mask of one pattern per column excludes the outlier columns from both.

Cost: x is read from memory at most twice, 2 bytes an element for 16 bits, and 1 byte is written. Rows that lie apart
are read in place. Threads share the tokens; maxima do not depend on how.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuda_kernels.cpu.bits import magnitude, widen
from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.team import run_on_team
from cuda_kernels.cpu.threads import part_of, run_parts
from cuda_kernels.reference import N_STEPS, QuantizedActivations

_MIN_ELEMENTS = 1 << 17
"""Elements that pay for a thread: about 20 us of work."""


@compiled()
def _column_maxima(x, row_stride, n_tokens, maxima, part, n_parts):  # type: ignore[no-untyped-def]
    """maxima[part]: each column's largest magnitude over the part's tokens, as bits."""
    largest = maxima[part]
    begin, end = part_of(n_tokens, 1, part, n_parts)
    for t in range(begin, end):
        row = x[t * row_stride : t * row_stride + largest.size]
        for k in range(largest.size):
            largest[k] = max(largest[k], magnitude(row[k]))


@compiled()
def _column_maxima_on_team(args, n_parts, n_threads, team):  # type: ignore[no-untyped-def]
    run_on_team(_column_maxima, args, n_parts, n_threads, team)


@compiled()
def _keep_all_but(outlier_columns, keep):  # type: ignore[no-untyped-def]
    """Write `keep`: all bits set, except in stored columns. Return False if those are not ascending column indices."""
    keep[:] = ~keep.dtype.type(0)
    previous = -1
    for column in outlier_columns:
        if column <= previous or column >= keep.size:
            return False
        keep[column] = 0
        previous = column
    return True


@compiled()
def _take_found(largest, threshold, keep, found_columns):  # type: ignore[no-untyped-def]
    """List the kept columns that reach the threshold, and clear those in `keep`; return the count of all."""
    n_found = 0
    for k in range(largest.size):
        if keep[k] != 0 and not (widen(largest[k]) < threshold):
            if n_found < found_columns.size:
                found_columns[n_found] = k
                keep[k] = 0
            n_found += 1
    return n_found


@compiled()
def _quantize_block(row, keep, codes):  # type: ignore[no-untyped-def]
    largest = magnitude(row.dtype.type(0))
    for k in range(row.size):
        largest = max(largest, magnitude(row.dtype.type(row[k] & keep[k])))
    absmax = widen(largest)
    inv_scale = (np.float32(1) / absmax) * np.float32(N_STEPS)
    if not np.isfinite(inv_scale):
        inv_scale = np.float32(0)
    if np.isfinite(absmax):
        for k in range(row.size):
            codes[k] = np.int8(np.rint(widen(row.dtype.type(row[k] & keep[k])) * inv_scale))
    else:
        codes[:] = 0
    return absmax


@compiled()
def _gather(row, columns, out):  # type: ignore[no-untyped-def]
    """out[j] = row[columns[j]], 0 for column -1."""
    for j in range(columns.size):
        out[j] = row[columns[j]] if columns[j] >= 0 else 0


@compiled()
def _quantize_tokens(x, row_stride, keep, columns, codes, absmax, block_size, side_x, part, n_parts):  # type: ignore[no-untyped-def]
    outlier_columns, found_columns = columns
    outlier_x, found_x = side_x
    begin, end = part_of(codes.shape[0], 1, part, n_parts)
    for t in range(begin, end):
        row = x[t * row_stride : t * row_stride + keep.size]
        for b in range(absmax.shape[1]):
            first, stop = b * block_size, min((b + 1) * block_size, keep.size)
            absmax[t, b] = _quantize_block(row[first:stop], keep[first:stop], codes[t, first:stop])
        _gather(row, outlier_columns, outlier_x[t])
        _gather(row, found_columns, found_x[t])


@compiled()
def _quantize_tokens_on_team(args, n_parts, n_threads, team):  # type: ignore[no-untyped-def]
    run_on_team(_quantize_tokens, args, n_parts, n_threads, team)


def activation_quantize(
    x: npt.NDArray[Any],
    outlier_columns: npt.NDArray[np.int32],
    threshold: float,
    result: QuantizedActivations[npt.NDArray[Any]],
    n_threads: int = 1,
) -> None:
    """Quantize tokens into arrays the caller allocated; see `reference.activation_quantize`.

    Bit-equal to the reference on x widened to float32: `threshold` is rounded to float32, not to the dtype of x. The
    codes of a block whose absmax is not finite are 0.

    Args:
        x: bits [M, K], rows any distance apart, last stride 1.
        outlier_columns: int32 [n], ascending, each once.
        result: written; C-contiguous; `outlier_x` and `found_x` as bits. The size of `found_columns` is the capacity.

    Raises:
        ValueError: `outlier_columns` are not ascending column indices.
    """
    n_tokens, n_columns = x.shape
    flat, row_stride = _flatten(x)
    n_worth = x.size // _MIN_ELEMENTS + 1
    keep = np.empty(n_columns, x.dtype)
    if not _keep_all_but(outlier_columns, keep):
        raise ValueError(f"expected ascending outlier columns below {n_columns}, found {outlier_columns.tolist()}")
    result.found_columns.fill(-1)
    result.n_found[0] = 0
    if result.found_columns.size:
        maxima = np.zeros((min(n_worth, n_threads), n_columns), x.dtype)
        args = (flat, row_stride, n_tokens, maxima)
        run_parts(_column_maxima, _column_maxima_on_team, args, n_worth, n_threads)
        result.n_found[0] = _take_found(maxima.max(0), np.float32(threshold), keep, result.found_columns)
    columns, side_x = (outlier_columns, result.found_columns), (result.outlier_x, result.found_x)
    block_size = result.block_size or n_columns
    rest = (flat, row_stride, keep, columns, result.codes, result.absmax, block_size, side_x)
    run_parts(_quantize_tokens, _quantize_tokens_on_team, rest, n_worth, n_threads)


def _flatten(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """The memory of x as one row, and the stride of the rows of x in elements, without a copy."""
    n_tokens, n_columns = x.shape
    if x.flags.c_contiguous:
        return x.reshape(-1), n_columns
    row_stride = x.strides[0] // x.itemsize
    return as_strided(x, ((n_tokens - 1) * row_stride + n_columns,), (x.itemsize,)), row_stride
