"""Sums of int8 products for a few tokens and a block of weight rows, the inner part of `int8_matmul`.

    products[t, n] = sum_k codes[t, k] * weight_codes[n, k]        int32, exact

1. One token: row after row, so that memory is read in one stream.
2. Four tokens by four rows: 16 sums in registers, so that 8 loads serve 16 vector products.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.int8_vectors import (
    N_LANES,
    OFFSET,
    add_products,
    load_codes,
    load_offset_codes,
    total,
    zero_sums,
)

N_TOKENS = 4
"""The most tokens of a call. Fewer are padded with the last one."""


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
def sum_codes(codes, sums):  # type: ignore[no-untyped-def]
    """Write what the offset of the weight codes adds to each token's products: 128 times its sum over whole vectors."""
    n_bytes = codes.shape[1] // N_LANES * N_LANES
    for t in range(codes.shape[0]):
        token_sum = np.int32(0)
        for k in range(n_bytes):
            token_sum += np.int32(codes[t, k])
        sums[t] = OFFSET * token_sum


@compiled()
def multiply_block(codes, offsets, t, n_tokens, weight_codes, n, n_rows, products):  # type: ignore[no-untyped-def]
    """Write products[:n_tokens, :n_rows] from token `t` and weight row `n` on; the rest is scratch."""
    n_columns = codes.shape[1]
    n_bytes = n_columns // N_LANES * N_LANES
    last, token_stride = n_tokens - 1, codes.strides[0]
    x0 = codes.ctypes.data + t * token_stride
    x1, x2, x3 = x0 + min(1, last) * token_stride, x0 + min(2, last) * token_stride, x0 + last * token_stride
    row_stride = weight_codes.strides[0]
    w = weight_codes.ctypes.data + n * row_stride
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
        for r in range(n_rows if n_bytes < n_columns else 0):
            for k in range(n_bytes, n_columns):
                products[i, r] += np.int32(codes[t + i, k]) * np.int32(weight_codes[n + r, k])
