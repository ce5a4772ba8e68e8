"""The int8 product with its epilogue fused, so that sums never leave the cache; see `reference.int8_matmul`.

For each 32 weight rows, the kernel widens the side weights once. Then, for every four tokens, it computes the rows'
products, exact in int32, block by block of columns, adds them up in float32, and finishes the outputs. Weights are read
from memory once for every 128 tokens, whose codes stay in the core's cache. The products:

1. One token: row after row, so that memory is read in one stream.
2. Four tokens by four rows: 16 sums in registers, so that 8 loads serve 16 vector products.

Cost: N * K bytes of weight codes read, the floor for few tokens; for many, M * N * K / 64 vector products, and for
each block of columns one more multiply-add an output, and the sum of a register's lanes.
Threads share the weight rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.dequantize_epilogue import (
    N_ROWS,
    add_scaled,
    bias_or_empty,
    finish_token,
    load_rows,
    widened_side_x,
)
from cuda_kernels.cpu.int8_vectors import (
    N_LANES,
    OFFSET,
    add_products,
    load_codes,
    load_offset_codes,
    total,
    zero_sums,
)
from cuda_kernels.cpu.team import run_on_team
from cuda_kernels.cpu.threads import part_of, run_parts
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

N_TOKENS = 4
"""Tokens of a call of `multiply_block`, at most. Fewer are padded with the last one."""

_N_ROUND = 128
"""Tokens per round: at 4,096 columns their codes take 512 KiB, and a block of weight rows 128 KiB."""

_MIN_WORK = 1 << 23
"""Work that pays for a thread, about 40 us: 8 units for each weight read, and 1 for each product."""


@compiled()
def _multiply(x, side_x, found_columns, weight, bias, y, part, n_parts):  # type: ignore[no-untyped-def]
    codes, x_absmax, block_size, offsets = x
    weight_codes, weight_absmax, outlier_weight = weight
    begin, end = part_of(weight_absmax.size, N_ROWS, part, n_parts)
    rows = np.zeros((2 + side_x.shape[1], N_ROWS), np.float32)
    products, spare = np.zeros((N_TOKENS, N_ROWS), np.int32), np.empty(N_ROWS, y.dtype)
    sums = np.zeros((N_TOKENS, N_ROWS), np.float32)
    for first in range(0, codes.shape[0], _N_ROUND):
        last = min(first + _N_ROUND, codes.shape[0])
        for n in range(begin, end, N_ROWS):
            stop = min(n + N_ROWS, end)
            load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, rows)
            for t in range(first, last, N_TOKENS):
                tokens = (t, min(N_TOKENS, last - t))
                sums[:] = 0
                for b in range(x_absmax.shape[1]):
                    columns = (b * block_size, min((b + 1) * block_size, codes.shape[1]))
                    multiply_block(codes, columns, offsets[:, b], tokens, weight_codes, n, stop - n, products)
                    for i in range(tokens[1]):
                        add_scaled(products[i], x_absmax[t + i, b], sums[i])
                for i in range(tokens[1]):
                    finish_token(sums[i], side_x[t + i], rows, spare, y[t + i, n:stop])


@compiled()
def _multiply_on_team(args, n_parts, n_threads, team):  # type: ignore[no-untyped-def]
    run_on_team(_multiply, args, n_parts, n_threads, team)


def int8_matmul(
    x: QuantizedActivations[npt.NDArray[Any]],
    weight: QuantizedWeight[npt.NDArray[Any]],
    y: npt.NDArray[Any],
    n_threads: int = 1,
) -> None:
    """Write the decomposed product `y` = x @ W.T + bias; see `reference.int8_matmul`.

    The integer sums are exact. The rest has the bits of `dequantize_epilogue`.

    Args:
        x, weight: C-contiguous; floats of the dtype of x as their bits.
        y: bits [M, N] of the dtype of x, C-contiguous.
    """
    n_tokens, n_columns = x.codes.shape
    block_size = x.block_size or n_columns
    offsets = np.empty(x.absmax.shape, np.int32)
    sum_codes(x.codes, block_size, offsets)
    side_x, bias = widened_side_x(x), bias_or_empty(weight)
    args = ((x.codes, x.absmax, block_size, offsets), side_x, x.found_columns, weight[:3], bias, y)
    n_worth = weight.codes.size * (8 + n_tokens) // _MIN_WORK + 1
    run_parts(_multiply, _multiply_on_team, args, n_worth, n_threads)


@compiled()
def _one_token(x, w, n_bytes):  # type: ignore[no-untyped-def]
    sums = zero_sums()
    for k in range(0, n_bytes, N_LANES):
        sums = add_products(sums, load_offset_codes(w, k), load_codes(x, k))
    return total(sums)


@compiled()
def _four_by_four(x0, x1, x2, x3, w0, w1, w2, w3, n_bytes, p, r):  # type: ignore[no-untyped-def]
    s00, s01, s02, s03 = zero_sums(), zero_sums(), zero_sums(), zero_sums()
    s10, s11, s12, s13 = zero_sums(), zero_sums(), zero_sums(), zero_sums()
    s20, s21, s22, s23 = zero_sums(), zero_sums(), zero_sums(), zero_sums()
    s30, s31, s32, s33 = zero_sums(), zero_sums(), zero_sums(), zero_sums()
    for k in range(0, n_bytes, N_LANES):
        row0, row1 = load_offset_codes(w0, k), load_offset_codes(w1, k)
        row2, row3 = load_offset_codes(w2, k), load_offset_codes(w3, k)
        x = load_codes(x0, k)
        s00, s01, s02, s03 = _four_rows(s00, s01, s02, s03, row0, row1, row2, row3, x)
        x = load_codes(x1, k)
        s10, s11, s12, s13 = _four_rows(s10, s11, s12, s13, row0, row1, row2, row3, x)
        x = load_codes(x2, k)
        s20, s21, s22, s23 = _four_rows(s20, s21, s22, s23, row0, row1, row2, row3, x)
        x = load_codes(x3, k)
        s30, s31, s32, s33 = _four_rows(s30, s31, s32, s33, row0, row1, row2, row3, x)
    p[0, r], p[0, r + 1], p[0, r + 2], p[0, r + 3] = total(s00), total(s01), total(s02), total(s03)
    p[1, r], p[1, r + 1], p[1, r + 2], p[1, r + 3] = total(s10), total(s11), total(s12), total(s13)
    p[2, r], p[2, r + 1], p[2, r + 2], p[2, r + 3] = total(s20), total(s21), total(s22), total(s23)
    p[3, r], p[3, r + 1], p[3, r + 2], p[3, r + 3] = total(s30), total(s31), total(s32), total(s33)


@compiled(inline="always")
def _four_rows(s0, s1, s2, s3, row0, row1, row2, row3, x):  # type: ignore[no-untyped-def]
    return add_products(s0, row0, x), add_products(s1, row1, x), add_products(s2, row2, x), add_products(s3, row3, x)


@compiled()
def sum_codes(codes, block_size, sums):  # type: ignore[no-untyped-def]
    """Write what the offset of the weight codes adds to each block's products: 128 times its sum over whole vectors."""
    for t in range(codes.shape[0]):
        for b in range(sums.shape[1]):
            first, stop = b * block_size, min((b + 1) * block_size, codes.shape[1])
            block_sum = np.int32(0)
            for k in range(first, first + (stop - first) // N_LANES * N_LANES):
                block_sum += np.int32(codes[t, k])
            sums[t, b] = OFFSET * block_sum


@compiled()
def multiply_block(codes, columns, offsets, tokens, weight_codes, n, n_rows, products):  # type: ignore[no-untyped-def]
    """Write products[:n_tokens, :n_rows] over a range of columns; the rest is scratch.

    Args:
        columns: the range, (first, stop).
        offsets: what `sum_codes` wrote for it, int32 [M].
        tokens: the first one, and how many.
        n, n_rows: the first weight row, and how many.
    """
    (first, stop), (t, n_tokens) = columns, tokens
    n_bytes = (stop - first) // N_LANES * N_LANES
    last, token_stride = n_tokens - 1, codes.strides[0]
    x0 = codes.ctypes.data + t * token_stride + first
    x1, x2, x3 = x0 + min(1, last) * token_stride, x0 + min(2, last) * token_stride, x0 + last * token_stride
    row_stride = weight_codes.strides[0]
    w = weight_codes.ctypes.data + n * row_stride + first
    end = w + (n_rows - 1) * row_stride
    if n_tokens == 1:
        for r in range(n_rows):
            products[0, r] = _one_token(x0, w + r * row_stride, n_bytes)
    else:
        for r in range(0, n_rows, 4):
            w0 = w + r * row_stride
            w1, w2, w3 = min(w0 + row_stride, end), min(w0 + 2 * row_stride, end), min(w0 + 3 * row_stride, end)
            _four_by_four(x0, x1, x2, x3, w0, w1, w2, w3, n_bytes, products, r)
    for i in range(n_tokens):
        for r in range(n_rows):
            products[i, r] -= offsets[t + i]
    for i in range(n_tokens):
        for r in range(n_rows if first + n_bytes < stop else 0):
            for k in range(first + n_bytes, stop):
                products[i, r] += np.int32(codes[t + i, k]) * np.int32(weight_codes[n + r, k])
