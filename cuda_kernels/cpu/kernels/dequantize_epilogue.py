"""Integer products to outputs: scales, outlier terms and bias in one pass; see `reference.dequantize_epilogue`.

Stored and found outlier columns are one list of side columns here. Their activations are float32. Their weights are
laid out so that those of consecutive rows are adjacent, because a vector register holds 16 rows.

    y[t, n] = fl(fl(sum_b fl(products[b] * x_scale[b]) * weight_scale) + x_side * weight_side + ... + bias)

with b the blocks of columns, ascending. Every step is rounded to float32, the additions go in the order of the columns,
stored before found, and no multiplication is fused with an addition: the bits are the same on every processor and for
every number of threads.

Cost: 4 bytes read and one output written per element. `int8_matmul` passes its products in registers and cache instead.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.bits import widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.float_vectors import (
    N_TOGETHER,
    add,
    fill,
    load_floats,
    load_integers,
    multiply,
    scale_and_add_four,
    scale_and_add_one,
    store_floats,
    store_narrow,
)
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import N_FLOATS, NO_MEMORY
from cuda_kernels.cpu.kernels.team import part_of, run_parts
from cuda_kernels.reference import N_STEPS

N_ROWS = N_FLOATS
"""Weight rows that are finished at a time."""

_MIN_ELEMENTS = 1 << 16
"""Outputs that pay for a thread."""

_PART_BYTES = 3 * 4 * N_ROWS
"""Memory of a part beside its rows: integers, sums, and outputs."""


@compiled()
def widen_side_x(outlier_x, found_x, side_x):  # type: ignore[no-untyped-def]
    """Write the activations of all side columns to `side_x`, float32 [M, n_side], the stored columns first."""
    n = outlier_x.shape[1]
    for t in range(side_x.shape[0]):
        for j in range(side_x.shape[1]):
            side_x[t, j] = widen(outlier_x[t, j]) if j < n else widen(found_x[t, j - n])


@compiled()
def load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, rows):  # type: ignore[no-untyped-def]
    """Fill `rows`, float32 [2 + n_side, N_ROWS], for the weight rows from `n` on: scale, bias, then side weights."""
    n_stored = outlier_weight.shape[1]
    for r in range(min(N_ROWS, weight_absmax.size - n)):
        scale = weight_absmax[n + r] / np.float32(N_STEPS)
        rows[0, r] = scale
        rows[1, r] = widen(bias[n + r]) if bias.size else np.float32(0)
        for j in range(n_stored):
            rows[2 + j, r] = widen(outlier_weight[n + r, j])
        for j in range(rows.shape[0] - 2 - n_stored):
            rows[2 + n_stored + j, r] = np.float32(weight_codes[n + r, found_columns[j]]) * scale


@compiled()
def _add_scaled(products, x_absmax, sums):  # type: ignore[no-untyped-def]
    """Add one token's products of one block of columns to its sums, both of N_ROWS weight rows, times their scale."""
    scaled = multiply(load_integers(products.ctypes.data), fill(x_absmax / np.float32(N_STEPS)))
    store_floats(add(load_floats(sums.ctypes.data), scaled), sums.ctypes.data)


@compiled()
def finish_tokens(sums, n_tokens, side_x, rows, spare, y, y_stride, n):  # type: ignore[no-untyped-def]
    """Write the outputs of tokens for N_ROWS weight rows, or fewer.

    Args:
        sums: float32 [n_tokens, N_ROWS], changed: the sums of the blocks' products, each times its block's scale.
        side_x: float32 [n_tokens, n_side].
        rows: what `load_rows` wrote.
        spare: scratch for N_ROWS outputs.
        y: flat, from the first token's output of these rows on.
        y_stride, n: elements from one token to the next, and rows.
    """
    row_bytes, n_side = rows.strides[0], side_x.shape[1]
    scale, side_weight = rows.ctypes.data, rows.ctypes.data + 2 * row_bytes
    n_fours = n_tokens // N_TOGETHER * N_TOGETHER
    for t in range(0, n_fours, N_TOGETHER):
        x = (side_x.ctypes.data + 4 * t * n_side, 4 * n_side)
        scale_and_add_four(sums.ctypes.data + t * row_bytes, scale, x, side_weight, n_side)
    for t in range(n_fours, n_tokens):
        x = (side_x.ctypes.data + 4 * t * n_side, 4 * n_side)
        scale_and_add_one(sums.ctypes.data + t * row_bytes, scale, x, side_weight, n_side)
    for t in range(n_tokens):
        outputs = add(load_floats(sums.ctypes.data + t * row_bytes), load_floats(scale + row_bytes))
        if n == N_ROWS:
            store_narrow(outputs, y[t * y_stride :].ctypes.data, spare[0])
        else:
            store_narrow(outputs, spare.ctypes.data, spare[0])
            for r in range(n):
                y[t * y_stride + r] = spare[r]


@compiled()
def row_bytes(n_side):  # type: ignore[no-untyped-def]
    """Return the size of the memory that `rows` of `load_rows` take for this many side columns."""
    return aligned((2 + n_side) * 4 * N_ROWS)


@compiled()
def _dequantize(products, x_absmax, side_x, found_columns, weight, bias, y, memory, part, n_parts):  # type: ignore[no-untyped-def]
    weight_codes, weight_absmax, outlier_weight = weight
    begin, end = part_of(weight_absmax.size, N_ROWS, part, n_parts)
    n_bytes = row_bytes(side_x.shape[1])
    at = memory + part * (n_bytes + _PART_BYTES)
    rows = view(at, (2 + side_x.shape[1], N_ROWS), np.float32(0))
    taken = view(at + n_bytes, (N_ROWS,), np.int32(0))
    sums = view(at + n_bytes + 4 * N_ROWS, (1, N_ROWS), np.float32(0))
    spare = view(at + n_bytes + 8 * N_ROWS, (N_ROWS,), y.dtype.type(0))
    rows[:] = 0
    taken[:] = 0
    for n in range(begin, end, N_ROWS):
        stop = min(n + N_ROWS, end)
        load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, rows)
        for t in range(products.shape[0]):
            for r in range(stop - n):
                taken[r] = products[t, n + r]
            sums[:] = 0
            _add_scaled(taken, x_absmax[t, 0], sums[0])
            finish_tokens(sums, 1, side_x[t : t + 1], rows, spare, y[t, n:], 0, stop - n)


@compiled()
def dequantize_epilogue(products, x_absmax, side, found_columns, weight, bias, y, team):  # type: ignore[no-untyped-def]
    """Write `y`; return 0, or NO_MEMORY.

    Args:
        side: outlier_x and found_x, and where to widen both to: float32 [M, n_side].
    """
    outlier_x, found_x, side_x = side
    widen_side_x(outlier_x, found_x, side_x)
    n_parts = min(products.size // _MIN_ELEMENTS + 1, team[3])
    memory = allocate(n_parts * (row_bytes(side_x.shape[1]) + _PART_BYTES))
    if memory == 0:
        return NO_MEMORY
    args = (products, x_absmax, side_x, found_columns, weight, bias, y, aligned(memory))
    run_parts(_dequantize, args, n_parts, team)
    release(memory)
    return 0
