"""Tokens to int8 codes, and the columns that stay as they are; see `reference.activation_quantize`.

1. Outlier columns are found by the maximum of their bit patterns over all tokens, unless `capacity` is 0.
2. Each block of a token is read twice, the second time from the core's own cache: first for its largest pattern, then
   for its codes. A mask of one pattern per column excludes the outlier columns from both.

Cost: x is read from memory at most twice, 2 bytes an element for 16 bits, and 1 byte is written. Rows that lie apart
are read in place. Threads share the tokens; maxima do not depend on how.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.bits import magnitude, widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import NO_MEMORY, NOT_ASCENDING
from cuda_kernels.cpu.kernels.team import part_of, run_parts
from cuda_kernels.reference import N_STEPS

_MIN_ELEMENTS = 1 << 15
"""Elements that pay for a thread: about 5 us of work."""


@compiled()
def parts_worth(n_elements, team):  # type: ignore[no-untyped-def]
    return min(n_elements // _MIN_ELEMENTS + 1, team[3])


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
def _keep_all_but(stored, keep):  # type: ignore[no-untyped-def]
    """Write `keep`: all bits set, except in stored columns. Return False if those are not ascending column indices."""
    keep[:] = ~keep.dtype.type(0)
    previous = -1
    for column in stored:
        if column <= previous or column >= keep.size:
            return False
        keep[column] = 0
        previous = column
    return True


@compiled()
def _take_found(maxima, threshold, keep, found):  # type: ignore[no-untyped-def]
    """List the kept columns that reach the threshold, and clear those in `keep`; return the count of all."""
    n_found = 0
    for k in range(keep.size):
        largest = maxima[0, k]
        for part in range(1, maxima.shape[0]):
            largest = max(largest, maxima[part, k])
        if keep[k] != 0 and not (widen(largest) < threshold):
            if n_found < found.size:
                found[n_found] = k
                keep[k] = 0
            n_found += 1
    return n_found


@compiled()
def find_columns(x, row_stride, n_tokens, stored, threshold, keep, found, team):  # type: ignore[no-untyped-def]
    """Write `keep` and `found`; return how many columns reach the threshold, or what went wrong.

    Args:
        x: bits, flat; its rows are `row_stride` elements apart.
        stored: int32, ascending: columns that are not looked for.
        keep: [columns], in the type of the bits: all bits set in the columns that become int8, else 0.
        found: int32 [capacity].
    """
    if not _keep_all_but(stored, keep):
        return NOT_ASCENDING
    found[:] = -1
    if found.size == 0:
        return 0
    n_parts = parts_worth(n_tokens * keep.size, team)
    memory = allocate(n_parts * keep.nbytes)
    if memory == 0:
        return NO_MEMORY
    maxima = view(aligned(memory), (n_parts, keep.size), keep.dtype.type(0))
    # A team may have fewer threads than asked for; what no part has written is 0.
    maxima[:] = 0
    run_parts(_column_maxima, (x, row_stride, n_tokens, maxima), n_parts, team)
    n_found = _take_found(maxima, threshold, keep, found)
    release(memory)
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
def quantize_token(row, keep, codes, absmax, block_size):  # type: ignore[no-untyped-def]
    """Write the codes of a token, and the absmax of its blocks. Codes of a block whose absmax is not finite are 0."""
    for b in range(absmax.size):
        first, stop = b * block_size, min((b + 1) * block_size, keep.size)
        absmax[b] = _quantize_block(row[first:stop], keep[first:stop], codes[first:stop])


@compiled()
def _gather(row, columns, out):  # type: ignore[no-untyped-def]
    """out[j] = row[columns[j]], 0 for column -1."""
    for j in range(columns.size):
        out[j] = row[columns[j]] if columns[j] >= 0 else 0


@compiled()
def _quantize_tokens(x, row_stride, keep, columns, result, block_size, part, n_parts):  # type: ignore[no-untyped-def]
    stored, found = columns
    codes, absmax, outlier_x, found_x = result
    begin, end = part_of(codes.shape[0], 1, part, n_parts)
    for t in range(begin, end):
        row = x[t * row_stride : t * row_stride + keep.size]
        quantize_token(row, keep, codes[t], absmax[t], block_size)
        _gather(row, stored, outlier_x[t])
        _gather(row, found, found_x[t])


@compiled()
def activation_quantize(x, row_stride, columns, threshold, keep, result, block_size, team):  # type: ignore[no-untyped-def]
    """Write the result, and return how many columns reach the threshold, or what went wrong.

    Args:
        x, row_stride, keep: as in `find_columns`.
        columns: `stored` and `found` there.
        result: codes, absmax, outlier_x and found_x of `reference.QuantizedActivations`.
    """
    n_tokens = result[0].shape[0]
    n_found = find_columns(x, row_stride, n_tokens, columns[0], threshold, keep, columns[1], team)
    if n_found >= 0:
        args = (x, row_stride, keep, columns, result, block_size)
        run_parts(_quantize_tokens, args, parts_worth(n_tokens * keep.size, team), team)
    return n_found
