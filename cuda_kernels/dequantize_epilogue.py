"""Integer products to outputs on the GPU, in one pass over them: scales, outlier terms, bias.

    y[t, n] = fma(fl(products[t, n] * x_scale[t]), weight_scale[n], extra[t, n]) + bias[n]
    extra   = sum_j outlier_x[t, j] * outlier_weight[n, j]                                    j ascending, one fma each
            + sum_j found_x[t, j] * fl(fl(weight_absmax[n] * STEP_OF_ABSMAX) * weight_codes[n, column])
    scale   = fl(absmax * STEP_OF_ABSMAX)

in float32, rounded once to the dtype of x. The order is fixed and spelled in instructions that no compiler fuses, and
the GEMV and the skinny product end in the same function: a token's output is the same bits whatever stands beside it
in the batch and whichever kernel computed it.

1. A block takes a tile of tokens and features, a thread 4 tokens and 4 adjacent features of it.
2. Outlier columns, stored and found alike, are widened into shared memory eight at a time, and there each value is used
   by the whole tile: 2 reads of 16 bytes for 16 multiply-adds.
3. Products come and outputs go in vectors: 16 bytes in, 8 out (16-bit outputs; a warp's 256 bytes are contiguous).

Bytes moved: 4 M N in, 2 M N out (4 for fp32), and the outlier weights, N n 2 bytes, once for each `TILE_TOKENS` tokens,
from L2. Floor on an H200 at 4.3 TB/s: M = 8192, N = 9216, fp16: 453 MB, 105 us. Not yet measured on a GPU.

Does not know where the products came from, nor whether the tokens' absmax is finite: infinity gives NaN or infinity.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy import float32, uint64

from cuda_kernels import tile_intrinsics as tile
from cuda_kernels.intrinsics import load_float, multiply_rn
from cuda_kernels.launch import Kernel, Launch
from cuda_kernels.reference import N_STEPS

THREADS = 256
TILE_TOKENS, TILE_FEATURES = 32, 128
CHUNK = 8
"""How many outlier columns are in shared memory at a time. With rows of a tile's width plus 4 floats, the 32 values a
warp writes there (8 columns of 4 features) fall into 32 different banks."""

POINTER = {
    "F16": types.CPointer(types.uint16),
    "BF16": types.CPointer(types.int16),
    "F32": types.CPointer(types.uint32),
}
"""How a kernel sees values of each dtype: the integer type of their bits names the format, as in `cpu.BITS_DTYPE`."""

STEP_OF_ABSMAX = np.float32(1) / np.float32(N_STEPS)
"""A product instead of a division by 127: within two roundings of it, and without the division's slow path."""

_SIXTEEN_ZEROS = (np.float32(0),) * 16
_FOUR_ZEROS = (np.float32(0),) * 4
_device = cuda.jit(device=True, inline="always")


class Operands(NamedTuple):
    """What an int8 product is made of, as addresses and sizes; shapes and dtypes as in `reference.int8_matmul`.

    dtype: "F16", "BF16" or "F32", of outlier_x, found_x, outlier_weight, bias and y.
    bias: 0 for none.
    """

    dtype: str
    codes: int
    x_absmax: int
    outlier_x: int
    found_columns: int
    n_found: int
    found_x: int
    weight_codes: int
    weight_absmax: int
    outlier_weight: int
    bias: int
    y: int
    n_tokens: int
    n_features: int
    n_columns: int
    n_outliers: int
    capacity: int


def epilogue_types(dtype: str) -> tuple[Any, ...]:
    """The types of a kernel's last arguments: what `make_epilogue` takes after the tile's place."""
    values, floats, columns = POINTER[dtype], types.CPointer(types.float32), types.CPointer(types.int32)
    pointers = (floats, values, columns, columns, values, types.CPointer(types.int8), floats, values, values, values)
    return (*pointers, types.uint32, *[types.uint64] * 5)


def epilogue_arguments(operands: Operands) -> tuple[int, ...]:
    """A kernel's last arguments, in the order of `epilogue_types`."""
    o = operands
    x = (o.x_absmax, o.outlier_x, o.found_columns, o.n_found, o.found_x)
    weight = (o.weight_codes, o.weight_absmax, o.outlier_weight, o.bias)
    return (*x, *weight, o.y, int(o.bias != 0), o.n_tokens, o.n_features, o.n_columns, o.n_outliers, o.capacity)


def make_extra(tile_tokens: int, tile_features: int, threads: int) -> Any:
    """The outlier terms of a thread's 4 tokens and 4 features, with the help of the whole block."""
    w_stride, x_stride = tile_features + 4, tile_tokens + 4
    w_size, x_size = CHUNK * w_stride, CHUNK * x_stride

    @_device
    def stage_weights(w, j0, n_terms, first_feature, found_columns, weight_codes, weight_absmax, outlier_weight, N, K, n):  # type: ignore[no-untyped-def]  # fmt: skip
        for i in range(cuda.threadIdx.x, CHUNK * tile_features, threads):
            j, feature = j0 + uint64(i % CHUNK), first_feature + uint64(i // CHUNK)
            value = float32(0)
            if j < n and feature < N:
                value = load_float(outlier_weight, feature * n + j)
            elif j < n_terms and feature < N:
                code = weight_codes[feature * K + uint64(found_columns[j - n])]
                value = multiply_rn(multiply_rn(weight_absmax[feature], STEP_OF_ABSMAX), float32(code))
            w[(i % CHUNK) * w_stride + i // CHUNK] = value

    @_device
    def stage_tokens(x, j0, n_terms, first_token, outlier_x, found_x, M, n, capacity):  # type: ignore[no-untyped-def]
        for i in range(cuda.threadIdx.x, CHUNK * tile_tokens, threads):
            j, token = j0 + uint64(i % CHUNK), first_token + uint64(i // CHUNK)
            value = float32(0)
            if j < n and token < M:
                value = load_float(outlier_x, token * n + j)
            elif j < n_terms and token < M:
                value = load_float(found_x, token * capacity + j - n)
            x[(i % CHUNK) * x_stride + i // CHUNK] = value

    @_device
    def extra_of(t, f, first_token, first_feature, outlier_x, found_columns, n_found, found_x, weight_codes,
                 weight_absmax, outlier_weight, M, N, K, n, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        w, x = cuda.shared.array(w_size, types.float32, alignment=16), cuda.shared.array(x_size, types.float32, alignment=16)
        sums = _SIXTEEN_ZEROS
        n_terms = n + min(uint64(n_found[0]), capacity)
        j0 = uint64(0)
        while j0 < n_terms:
            cuda.syncthreads()  # The chunk before has been used.
            stage_weights(w, j0, n_terms, first_feature, found_columns, weight_codes, weight_absmax, outlier_weight, N, K, n)  # fmt: skip
            stage_tokens(x, j0, n_terms, first_token, outlier_x, found_x, M, n, capacity)
            cuda.syncthreads()
            for j in range(min(uint64(CHUNK), n_terms - j0)):
                tokens = tile.load4_shared(x, uint64(j) * uint64(x_stride) + t)
                features = tile.load4_shared(w, uint64(j) * uint64(w_stride) + f)
                sums = tile.fma_tile(sums, tokens, features)
            j0 += uint64(CHUNK)
        return sums

    return extra_of


def make_epilogue(tile_tokens: int, tile_features: int, threads: int, read_products: Any) -> Any:
    """What every int8 product ends in: a tile's products to outputs, by the whole block.

    Args:
        tile_tokens, tile_features: multiples of 4, their product at most 16 `threads`.
        read_products: (products, t, f, first_token, first_feature, M, N) -> the products of four tokens and four
            features, from a place of the tile whose first token and first feature are in the matrix.
    """
    assert tile_tokens % 4 == 0 and tile_features % 4 == 0 and tile_tokens * tile_features <= 16 * threads
    extra_of = make_extra(tile_tokens, tile_features, threads)
    across = tile_features // 4

    @_device
    def store_token(y, token, feature, values, M, N):  # type: ignore[no-untyped-def]
        if token < M:
            if N % uint64(4) == uint64(0):
                tile.store4(y, token * N + feature, values)
            else:
                tile.store4_before(y, token * N + feature, (token + uint64(1)) * N, values)

    @_device
    def epilogue(products, first_token, first_feature, x_absmax, outlier_x, found_columns, n_found, found_x,
                 weight_codes, weight_absmax, outlier_weight, bias, y, has_bias, M, N, K, n, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        f, t = uint64(cuda.threadIdx.x % across) * uint64(4), uint64(cuda.threadIdx.x // across) * uint64(4)
        is_idle = t >= uint64(tile_tokens)
        if is_idle:
            t = uint64(0)
        extra = extra_of(t, f, first_token, first_feature, outlier_x, found_columns, n_found, found_x, weight_codes,
                         weight_absmax, outlier_weight, M, N, K, n, capacity)  # fmt: skip
        token, feature = first_token + t, first_feature + f
        if is_idle or token >= M or feature >= N:
            return
        last = N - uint64(1)
        x_scales = tile.multiply_tile(tile.load4_clamped(x_absmax, token, M - uint64(1)), STEP_OF_ABSMAX)
        weight_scales = tile.multiply_tile(tile.load4_clamped(weight_absmax, feature, last), STEP_OF_ABSMAX)
        biases = _FOUR_ZEROS
        if has_bias:
            biases = tile.widen_tile(tile.load4_clamped(bias, feature, last))
        four_by_four = read_products(products, t, f, first_token, first_feature, M, N)
        values = tile.narrow_tile(y, tile.scale_tile(four_by_four, x_scales, weight_scales, extra, biases))
        store_token(y, token, feature, values[0:4], M, N)
        store_token(y, token + uint64(1), feature, values[4:8], M, N)
        store_token(y, token + uint64(2), feature, values[8:12], M, N)
        store_token(y, token + uint64(3), feature, values[12:16], M, N)

    return epilogue


def shared_products(stride: int) -> Any:
    """`read_products` from a shared int32 [tile_tokens, stride], where 4 divides the stride."""

    @_device
    def read(products, t, f, _first_token, _first_feature, _M, _N):  # type: ignore[no-untyped-def]
        at = t * uint64(stride) + f
        p0, p1 = tile.load4_shared(products, at), tile.load4_shared(products, at + uint64(stride))
        p2, p3 = tile.load4_shared(products, at + uint64(2 * stride)), tile.load4_shared(products, at + uint64(3 * stride))  # fmt: skip
        return p0 + p1 + p2 + p3

    return read


@_device
def _global_products(products, t, f, first_token, first_feature, M, N):  # type: ignore[no-untyped-def]
    last, token, feature = M - uint64(1), first_token + t, first_feature + f
    r0, r1 = token * N, min(token + uint64(1), last) * N
    r2, r3 = min(token + uint64(2), last) * N, min(token + uint64(3), last) * N
    if N % uint64(4) == uint64(0):
        p0, p1 = tile.load4(products, r0 + feature), tile.load4(products, r1 + feature)
        p2, p3 = tile.load4(products, r2 + feature), tile.load4(products, r3 + feature)
    else:
        end = N - uint64(1)
        p0 = tile.load4_clamped(products, r0 + feature, r0 + end)
        p1 = tile.load4_clamped(products, r1 + feature, r1 + end)
        p2 = tile.load4_clamped(products, r2 + feature, r2 + end)
        p3 = tile.load4_clamped(products, r3 + feature, r3 + end)
    return p0 + p1 + p2 + p3


@cache
def _kernel(dtype: str, tile_tokens: int, tile_features: int) -> Kernel:
    epilogue = make_epilogue(tile_tokens, tile_features, THREADS, _global_products)

    def dequantize_epilogue(products, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax,
                            outlier_weight, bias, y, has_bias, M, N, K, n, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        # products int32 [M, N]; y [M, N]; the rest as in `Operands`. Grid: tiles of features x tiles of tokens.
        first_feature = uint64(cuda.blockIdx.x) * uint64(tile_features)
        first_token = uint64(cuda.blockIdx.y) * uint64(tile_tokens)
        epilogue(products, first_token, first_feature, x_absmax, outlier_x, found_columns, n_found, found_x,
                 weight_codes, weight_absmax, outlier_weight, bias, y, has_bias, M, N, K, n, capacity)  # fmt: skip

    signature = (types.CPointer(types.int32), *epilogue_types(dtype))
    return Kernel(dequantize_epilogue, signature, THREADS)


def launches(
    operands: Operands, products: int, tile_tokens: int = TILE_TOKENS, tile_features: int = TILE_FEATURES
) -> list[Launch]:
    """One launch; `products` is the address of int32 [M, N]."""
    grid = (-(-operands.n_features // tile_features), -(-operands.n_tokens // tile_tokens), 1)
    kernel = _kernel(operands.dtype, tile_tokens, tile_features)
    return [Launch(kernel, grid, 0, (products, *epilogue_arguments(operands)))]
