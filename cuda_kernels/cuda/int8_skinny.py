"""The int8 product of up to 64 tokens on the GPU: one pass over the weights, on the tensor cores, the epilogue fused.

    products[t, n] = sum_k codes[t, k] * weight_codes[n, k]        int32, exact, in any order
    y              = as in `epilogue`

1. The weight is the mma's operand of 16 rows, and the tokens are its 8 columns: m16n8k32, int8. Both are loaded into
   the registers in which they are multiplied, 16 bytes a load; `ptx.products.mma_tile` describes the order of columns.
2. A warp takes `row_tiles` times 16 rows of the weight and `token_tiles` times 8 tokens. It loads `in_flight` steps of
   64 columns before it multiplies the first. The weights bypass the L1 cache, and the tokens' codes stay in it.
3. `split` warps share the same rows and take turns along the columns. Their sums are added in shared memory; integer
   sums do not depend on the order.

Bytes moved: the weights, N K, once; M K codes once a block, from L2: at M = 64 with 64 features a block, as much as the
weights. Floor on an H200 at 4.3 TB/s: N = K = 9216 20 us, 9216 x 36864 79 us. Not yet measured on a GPU. Needs sm_80.

Each code is loaded alone if rows or addresses are not multiples of 16 bytes: correct, and slow.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda.epilogue import make_epilogue, shared_products
from cuda_kernels.cuda.int8_gemv import fitting, make_sweep
from cuda_kernels.cuda.int8_operands import Operands, epilogue_arguments, epilogue_types
from cuda_kernels.cuda.launch import Kernel, Launch
from cuda_kernels.cuda.ptx.products import VECTOR, Turn, add_mma_tile, mma_tile

LEAST_CAPABILITY = (8, 0)
"""The first compute capability with this mma."""

WARPS = 8
THREADS = 32 * WARPS
STEP = 4 * VECTOR
"""Columns that a warp multiplies at a time: four lanes share a row."""


class Plan(NamedTuple):
    """The sizes that cut the work, all of them compiled in.

    token_tiles: tiles of 8 tokens of a block, 1, 2, 4 or 8. row_tiles: tiles of 16 weight rows of a warp. in_flight:
    steps loaded before the first is used. split: warps that share the same rows. blocks: the fewest that a
    multiprocessor must hold, which bounds the registers. A block's tokens times its features may not exceed 4096.
    """

    token_tiles: int
    row_tiles: int
    in_flight: int
    split: int
    blocks: int


def plan(n_tokens: int, n_features: int, n_columns: int) -> Plan:
    """Choose the most loads in flight that registers allow, and a block a multiprocessor. A guess, not measured."""
    token_tiles = next((t for t in (1, 2, 4) if n_tokens <= 8 * t), 8)
    row_tiles, most_in_flight, blocks = {1: (1, 4, 2), 2: (1, 4, 2), 4: (2, 1, 2), 8: (2, 2, 1)}[token_tiles]
    splits = [s for s in (1, 2, 4, 8) if WARPS // s * 16 * row_tiles * 8 * token_tiles <= 16 * THREADS]
    split = next((s for s in splits if n_features * s >= 2 * 132 * WARPS * 16 * row_tiles), splits[-1])
    return Plan(token_tiles, row_tiles, fitting(most_in_flight, split * STEP, n_columns), split, blocks)


@cache
def _kernel(dtype: str, cut: Plan, is_aligned: bool) -> Kernel:
    token_tiles, row_tiles, in_flight, split, _ = cut
    groups, rows = WARPS // split, 16 * row_tiles
    tile_tokens, tile_features = 8 * token_tiles, groups * rows
    # A lane adds at row g, token 2 q. With 4 more than a multiple of 16 features, a warp's 32 places are in 32 banks.
    stride = tile_features + 4
    n_products, add_products = tile_tokens * stride, add_mma_tile(token_tiles, stride)
    turn = Turn(in_flight, STEP, is_aligned)
    sweep = make_sweep((2 * row_tiles, 8), (token_tiles, 8), mma_tile(in_flight), turn, split)
    epilogue = make_epilogue(tile_tokens, tile_features, THREADS, shared_products(stride))
    zeros = (np.int32(0),) * (4 * row_tiles * token_tiles)

    def int8_skinny(  # type: ignore[no-untyped-def]
        codes, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight,
        bias, y, has_bias, M, N, K, n, capacity,
    ):  # fmt: skip
        # codes int8 [M, K]; weight_codes int8 [N, K]; y [M, N]; the rest as in `Operands`.
        # Grid: tiles of features x tiles of tokens. Lane 4 g + q is at rows and tokens g, at columns 16 q.
        products = cuda.shared.array(n_products, types.int32, alignment=16)
        for i in range(cuda.threadIdx.x, n_products, THREADS):
            products[i] = 0
        cuda.syncthreads()
        first_feature = cuda.blockIdx.x * tile_features
        first_token = cuda.blockIdx.y * tile_tokens
        g, q, warp = cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4, cuda.threadIdx.x // 32
        row_of_tile = warp % groups * rows + g
        row, token = first_feature + row_of_tile, first_token + g
        sums = sweep(zeros, weight_codes, codes, row, token, warp // groups, q * VECTOR, M, N, K)
        add_products(products, 2 * q * stride + row_of_tile, sums)
        cuda.syncthreads()
        terms = (outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
        epilogue(products, first_token, first_feature, x_absmax, terms, bias, has_bias, y, (M, N, K, n, capacity))

    return Kernel(int8_skinny, (types.CPointer(types.int8), *epilogue_types(dtype)), THREADS, cut.blocks)


def launches(operands: Operands, cut: Plan | None = None) -> list[Launch]:
    """Plan one launch, for any number of tokens, 8 `token_tiles` at a time."""
    o = operands
    cut = cut or plan(o.n_tokens, o.n_features, o.n_columns)
    if not o.is_aligned:
        cut = cut._replace(in_flight=1, blocks=1)
    grid = (-(-o.n_features // (WARPS // cut.split * 16 * cut.row_tiles)), -(-o.n_tokens // (8 * cut.token_tiles)), 1)
    return [Launch(_kernel(o.dtype, cut, o.is_aligned), grid, 0, (o.x.codes, *epilogue_arguments(o)))]
