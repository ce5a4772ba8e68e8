"""The last step of every int8 product on the GPU: a block converts a tile of integer products to outputs.

    y[t, n] = fma(fl(products[t, n] * x_scale[t]), weight_scale[n], extra[t, n]) + bias[n]
    extra   = sum_j outlier_x[t, j] * outlier_weight[n, j]                                      j ascending, an fma each
            + sum_j found_x[t, j] * fl(weight_scale[n] * weight_codes[n, found_columns[j]])
    scale   = fl(absmax * fl(1 / 127))

in float32, rounded once to the dtype of x. The order is fixed, in instructions that no compiler fuses. So the bits of a
token's output depend neither on the other tokens of its batch nor on the kernel that made the products.

1. A thread computes 4 tokens by 4 adjacent features of the tile.
2. Outlier columns, stored and found alike, are widened into shared memory eight at a time. Each value there serves the
   whole tile: 2 reads of 16 bytes for 16 multiply-adds.

If no columns were found, the device reads only `n_found` of the found columns' arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy import float32, uint32

from cuda_kernels.cuda.ptx import tiles as tile
from cuda_kernels.cuda.ptx.scalars import load_float, multiply_rn
from cuda_kernels.cuda.ptx.tiles import STEP_OF_ABSMAX

CHUNK = 8
"""Outlier columns in shared memory at a time. With rows of a tile's width plus 4 floats, the 32 values
that a warp writes there (8 columns of 4 features) fall into 32 different banks."""

_SIXTEEN_ZEROS = (np.float32(0),) * 16
_FOUR_ZEROS = (np.float32(0),) * 4
_FOUR_ONES = (np.float32(1),) * 4
_device = cuda.jit(device=True, inline="always")


def _make_stage(tile_tokens: int, tile_features: int, threads: int) -> Any:
    """Make the function that copies outlier columns j0 ... j0 + 7 to shared memory as float32, 0 past the last."""
    w_stride, x_stride = tile_features + 4, tile_tokens + 4

    @_device
    def stage(w, x, j0, n_terms, first_token, first_feature, terms, sizes):  # type: ignore[no-untyped-def]
        outlier_x, found_columns, _, found_x, weight_codes, weight_absmax, outlier_weight = terms
        M, N, K, n, capacity = sizes
        for i in range(cuda.threadIdx.x, CHUNK * tile_features, threads):
            j, feature = j0 + i % CHUNK, first_feature + i // CHUNK
            value = float32(0)
            if j < n and feature < N:
                value = load_float(outlier_weight, feature * n + j)
            elif j < n_terms and feature < N:
                code = weight_codes[feature * K + found_columns[j - n]]
                value = multiply_rn(multiply_rn(weight_absmax[feature], STEP_OF_ABSMAX), float32(code))
            w[(i % CHUNK) * w_stride + i // CHUNK] = value
        for i in range(cuda.threadIdx.x, CHUNK * tile_tokens, threads):
            j, token = j0 + i % CHUNK, first_token + i // CHUNK
            value = float32(0)
            if j < n and token < M:
                value = load_float(outlier_x, token * n + j)
            elif j < n_terms and token < M:
                value = load_float(found_x, token * capacity + j - n)
            x[(i % CHUNK) * x_stride + i // CHUNK] = value

    return stage


def _make_extra(tile_tokens: int, tile_features: int, threads: int) -> Any:
    """Make the function that computes the outlier terms of a thread's 16 outputs; all threads must call it."""
    stage = _make_stage(tile_tokens, tile_features, threads)
    w_stride, x_stride = tile_features + 4, tile_tokens + 4
    w_size, x_size = CHUNK * w_stride, CHUNK * x_stride

    @_device
    def extra_of(t, f, first_token, first_feature, terms, sizes):  # type: ignore[no-untyped-def]
        w = cuda.shared.array(w_size, types.float32, alignment=16)
        x = cuda.shared.array(x_size, types.float32, alignment=16)
        n_found, n, capacity = terms[2], sizes[3], sizes[4]
        n_terms = n + min(n_found[0], capacity)
        sums, j0 = _SIXTEEN_ZEROS, 0
        while j0 < n_terms:
            cuda.syncthreads()  # All threads have used the previous columns.
            stage(w, x, j0, n_terms, first_token, first_feature, terms, sizes)
            cuda.syncthreads()
            for j in range(min(CHUNK, n_terms - j0)):
                tokens = tile.load4_shared(x, j * x_stride + t)
                features = tile.load4_shared(w, j * w_stride + f)
                sums = tile.fma_tile(sums, tokens, features)
            j0 += CHUNK
        return sums

    return extra_of


def make_epilogue(
    tile_tokens: int, tile_features: int, threads: int, read_products: Any, is_scaled: bool = False
) -> Any:
    """Make (products, first_token, first_feature, x_absmax, terms, bias, has_bias, y, sizes), which writes a tile of y.

    All threads of a block must call it. `terms` are outlier_x, found_columns, n_found, found_x, weight_codes,
    weight_absmax and outlier_weight. `sizes` are M, N, K, n and capacity, where a smaller M ends the tile earlier.

    Args:
        tile_tokens, tile_features: multiples of 4, their product at most 16 `threads`.
        read_products: (products, t, f, first_token, first_feature, M, N) -> the products of four tokens by four
            features, of which the first token and the first feature are within the matrix.
        is_scaled: the products are float32 and hold the scales of x; `x_absmax` is not read.
    """
    assert tile_tokens % 4 == 0 and tile_features % 4 == 0 and tile_tokens * tile_features <= 16 * threads
    extra_of = _make_extra(tile_tokens, tile_features, threads)
    across = tile_features // 4

    @_device
    def epilogue(products, first_token, first_feature, x_absmax, terms, bias, has_bias, y, sizes):  # type: ignore[no-untyped-def]
        M, N = sizes[0], sizes[1]
        t, f = cuda.threadIdx.x // across * 4, cuda.threadIdx.x % across * 4
        is_idle = t >= tile_tokens
        if is_idle:
            t = 0
        extra = extra_of(t, f, first_token, first_feature, terms, sizes)
        token, feature = first_token + t, first_feature + f
        if is_idle or token >= M or feature >= N:
            return
        x_scales = _FOUR_ONES
        if not is_scaled:
            x_scales = tile.multiply_tile(tile.load4_clamped(x_absmax, token, M - 1), STEP_OF_ABSMAX)
        weight_scales = tile.multiply_tile(tile.load4_clamped(terms[5], feature, N - 1), STEP_OF_ABSMAX)
        biases = _FOUR_ZEROS
        if has_bias != uint32(0):
            biases = tile.widen_tile(tile.load4_clamped(bias, feature, N - 1))
        sixteen = read_products(products, t, f, first_token, first_feature, M, N)
        values = tile.scale_tile(sixteen, x_scales, weight_scales, extra, biases)
        tile.store_tile(y, token, feature, M, N, tile.narrow_tile(y, values))

    return epilogue


def shared_products(stride: int) -> Any:
    """Make `read_products` for a shared int32 [tile_tokens, stride]; 4 must divide the stride."""

    @_device
    def read(products, t, f, _first_token, _first_feature, _M, _N):  # type: ignore[no-untyped-def]
        at = t * stride + f
        p0, p1 = tile.load4_shared(products, at), tile.load4_shared(products, at + stride)
        p2, p3 = tile.load4_shared(products, at + 2 * stride), tile.load4_shared(products, at + 3 * stride)
        return p0 + p1 + p2 + p3

    return read
