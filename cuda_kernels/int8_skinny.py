"""The int8 product of up to 64 tokens on the GPU: one pass over the weights, on the tensor cores, the epilogue fused.

    products[t, n] = sum_k codes[t, k] * weight_codes[n, k]        int32, exact, in any order
    y              = as in `dequantize_epilogue`

1. The weight is the mma's operand of 16 rows, the tokens its 8 columns: m16n8k32, int8. Both go from memory to the
   registers they are multiplied in, 16 bytes a load; `tile_intrinsics.mma_tile` says how the columns are dealt out.
2. A warp takes `row_tiles` times 16 rows of the weight and `token_tiles` times 8 tokens, and asks for `in_flight` steps
   of 64 columns before it multiplies the first. The weights pass by the L1 cache, the tokens' codes stay in it.
3. `split` warps share the same rows and take turns along the columns. Their sums meet in shared memory; integers come
   out the same in any order.

Bytes moved: the weights, N K, once; M K codes once a block, from L2: at M = 64 with 64 features a block, as much as the
weights. Floor on an H200 at 4.3 TB/s: N = K = 9216 20 us, 9216 x 36864 79 us. Not yet measured on a GPU. Needs sm_80.

Rows that are not a multiple of 16 bytes, or an address that is not, cost a load for every code: correct, and slow.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy import uint64

from cuda_kernels import dequantize_epilogue as ending
from cuda_kernels import tile_intrinsics as tile
from cuda_kernels.int8_gemv import VECTOR, make_load, make_load_rows, make_steps
from cuda_kernels.intrinsics import load_16_bytes, stream_16_bytes
from cuda_kernels.launch import Kernel, Launch

WARPS = 8
STEP = 4 * VECTOR
"""Columns that a warp multiplies at once: four lanes share a row."""
LEAST_CAPABILITY = (8, 0)
"""The first compute capability with this mma."""


class Plan(NamedTuple):
    """How the work is cut; all are compiled in.

    token_tiles: 1, 2, 4 or 8, of 8 tokens, of a block. row_tiles: of 16 rows of the weight, of a warp. in_flight: steps
    asked for before the first is used. split: warps that share the same rows; a block's tokens times its features may
    not exceed 4096, 16 for each thread.
    """

    token_tiles: int
    row_tiles: int
    in_flight: int
    split: int


def plan(n_tokens: int, n_features: int, n_columns: int) -> Plan:
    """Eight vectors of weights in flight a lane, and blocks enough for every multiprocessor: a guess, not measured."""
    token_tiles = next((t for t in (1, 2, 4) if n_tokens <= 8 * t), 8)
    row_tiles = 1 if token_tiles <= 2 else 2
    splits = [s for s in (1, 2, 4, 8) if (WARPS // s * 16 * row_tiles) * 8 * token_tiles <= 16 * 32 * WARPS]
    split = next((s for s in splits if n_features * s >= 2 * 132 * WARPS * 16 * row_tiles), splits[-1])
    return Plan(token_tiles, row_tiles, 4 // row_tiles, split)


@cache
def _kernel(dtype: str, cut: Plan, is_aligned: bool) -> Kernel:
    token_tiles, row_tiles, in_flight, split = cut
    groups, rows = WARPS // split, 16 * row_tiles
    tile_tokens, tile_features = 8 * token_tiles, groups * rows
    # With 4 more than a multiple of 32, an mma's 8 rows of 4 token pairs fall into 32 different banks.
    stride = tile_features + 4
    n_products, threads = tile_tokens * stride, 32 * WARPS
    load_rows = make_load_rows(make_load(is_aligned, stream_16_bytes), 2 * row_tiles, 8)
    load_tokens = make_load_rows(make_load(is_aligned, load_16_bytes), token_tiles, 8)
    steps = make_steps(load_rows, load_tokens, tile.mma_tile, in_flight, STEP)
    add_products = tile.add_mma_tile(token_tiles, stride)
    epilogue = ending.make_epilogue(tile_tokens, tile_features, threads, ending.shared_products(stride))
    zeros, turn, turns = (np.int32(0),) * (4 * row_tiles * token_tiles), in_flight * STEP, split * in_flight * STEP

    def int8_skinny(codes, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax,
                    outlier_weight, bias, y, has_bias, M, N, K, n, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        # codes int8 [M, K]; weight_codes int8 [N, K]; y [M, N]; the rest as in `Operands`.
        # Grid: tiles of features x tiles of tokens. Lane 4 g + q is at rows and tokens g, at columns 16 q.
        products = cuda.shared.array(n_products, types.int32, alignment=16)
        for i in range(cuda.threadIdx.x, n_products, threads):
            products[i] = 0
        cuda.syncthreads()
        first_feature = uint64(cuda.blockIdx.x) * uint64(tile_features)
        first_token = uint64(cuda.blockIdx.y) * uint64(tile_tokens)
        g, q, warp = cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4, cuda.threadIdx.x // 32
        row = warp % groups * rows + g
        sums = zeros
        k = uint64(warp // groups * turn)
        while k < K:
            at = k + uint64(q * VECTOR)
            sums = steps(
                sums, weight_codes, codes, first_feature + uint64(row), first_token + uint64(g), at, M, N, K
            )
            k += uint64(turns)
        add_products(products, uint64(2 * q * stride + row), sums)
        cuda.syncthreads()
        epilogue(products, first_token, first_feature, x_absmax, outlier_x, found_columns, n_found, found_x,
                 weight_codes, weight_absmax, outlier_weight, bias, y, has_bias, M, N, K, n, capacity)  # fmt: skip

    signature = (types.CPointer(types.int8), *ending.epilogue_types(dtype))
    return Kernel(int8_skinny, signature, threads)


def launches(operands: ending.Operands, cut: Plan | None = None) -> list[Launch]:
    """One launch; any number of tokens, of which it takes 8 `token_tiles` at a time."""
    o = operands
    cut = cut or plan(o.n_tokens, o.n_features, o.n_columns)
    is_aligned = (o.codes | o.weight_codes | o.n_columns) % VECTOR == 0
    kernel = _kernel(o.dtype, cut, is_aligned)
    grid = (-(-o.n_features // (WARPS // cut.split * 16 * cut.row_tiles)), -(-o.n_tokens // (8 * cut.token_tiles)), 1)
    return [Launch(kernel, grid, 0, (o.codes, *ending.epilogue_arguments(o)))]
