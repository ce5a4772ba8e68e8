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

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.cpu.bits import widen
from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.float_vectors import (
    N_FLOATS,
    add,
    fill,
    load_floats,
    load_integers,
    multiply,
    store_floats,
    store_narrow,
)
from cuda_kernels.cpu.team import run_on_team
from cuda_kernels.cpu.threads import part_of, run_parts
from cuda_kernels.reference import N_STEPS, QuantizedActivations, QuantizedWeight

N_ROWS = N_FLOATS
"""Weight rows that are finished at a time."""

_MIN_ELEMENTS = 1 << 18
"""Outputs that pay for a thread."""


@compiled()
def _widen_side_x(outlier_x, found_x, side_x):  # type: ignore[no-untyped-def]
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
def add_scaled(products, x_absmax, sums):  # type: ignore[no-untyped-def]
    """Add one token's products of one block of columns to its sums, both of N_ROWS weight rows, times their scale."""
    scaled = multiply(load_integers(products.ctypes.data), fill(x_absmax / np.float32(N_STEPS)))
    store_floats(add(load_floats(sums.ctypes.data), scaled), sums.ctypes.data)


@compiled()
def finish_token(scaled, side_x, rows, spare, y):  # type: ignore[no-untyped-def]
    """Write the outputs of one token for N_ROWS weight rows from what `add_scaled` summed.

    Args:
        rows: what `load_rows` wrote.
        spare: scratch for N_ROWS outputs.
    """
    row_bytes = rows.strides[0]
    scale = rows.ctypes.data
    bias, side_weight = scale + row_bytes, scale + 2 * row_bytes
    sums = multiply(load_floats(scaled.ctypes.data), load_floats(scale))
    for j in range(side_x.size):
        sums = add(sums, multiply(fill(side_x[j]), load_floats(side_weight + j * row_bytes)))
    sums = add(sums, load_floats(bias))
    if y.size == N_ROWS:
        store_narrow(sums, y.ctypes.data, y[0])
    else:
        store_narrow(sums, spare.ctypes.data, spare[0])
        y[:] = spare[: y.size]


@compiled()
def _dequantize(products, x_absmax, side_x, found_columns, weight, bias, y, part, n_parts):  # type: ignore[no-untyped-def]
    weight_codes, weight_absmax, outlier_weight = weight
    begin, end = part_of(weight_absmax.size, N_ROWS, part, n_parts)
    rows = np.zeros((2 + side_x.shape[1], N_ROWS), np.float32)
    taken, spare, sums = np.zeros(N_ROWS, np.int32), np.empty(N_ROWS, y.dtype), np.zeros(N_ROWS, np.float32)
    for n in range(begin, end, N_ROWS):
        stop = min(n + N_ROWS, end)
        load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, rows)
        for t in range(products.shape[0]):
            taken[: stop - n] = products[t, n:stop]
            sums[:] = 0
            add_scaled(taken, x_absmax[t, 0], sums)
            finish_token(sums, side_x[t], rows, spare, y[t, n:stop])


@compiled()
def _dequantize_on_team(args, n_parts, n_threads, team):  # type: ignore[no-untyped-def]
    run_on_team(_dequantize, args, n_parts, n_threads, team)


def dequantize_epilogue(
    products: npt.NDArray[np.int32],
    x: QuantizedActivations[npt.NDArray[Any]],
    weight: QuantizedWeight[npt.NDArray[Any]],
    y: npt.NDArray[Any],
    n_threads: int = 1,
) -> None:
    """Write `y` from the integer products; see `reference.dequantize_epilogue`.

    Args:
        products: int32 [M, N] over all columns, C-contiguous.
        x, weight, y: as for `int8_matmul`; x of one block; `x.codes` is not read.
    """
    args = (products, x.absmax, widened_side_x(x), x.found_columns, weight[:3], bias_or_empty(weight), y)
    run_parts(_dequantize, _dequantize_on_team, args, products.size // _MIN_ELEMENTS + 1, n_threads)


def widened_side_x(x: QuantizedActivations[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The activations of all side columns, stored and found, float32 [M, n_side]."""
    n_taken = min(int(x.n_found[0]), x.found_columns.size)
    side_x = np.empty((x.absmax.shape[0], x.outlier_x.shape[1] + n_taken), np.float32)
    _widen_side_x(x.outlier_x, x.found_x, side_x)
    return side_x


def bias_or_empty(weight: QuantizedWeight[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The bias as compiled code takes it: an empty array stands for none."""
    return np.empty(0, weight.outlier_weight.dtype) if weight.bias is None else weight.bias
