"""The int8 product of activations with a scale for each block of columns on the GPU, the epilogue fused.

    products[b, t, n] = sum_k codes[t, k] * weight_codes[n, k]        k in block b: int32, exact, in any order
    sums[t, n]        = fma(products[b, t, n], x_scale[t, b], sums)   b ascending, in each of `split` parts
    y                 = as in `epilogue`, from the parts' sums in their order

1. As in `int8_skinny`, a warp takes `row_tiles` times 16 rows of the weight and `token_tiles` times 8 tokens, and the
   tensor cores multiply. A turn is one block of columns. The mma leaves each lane whole products of the block, which
   the lane scales and adds up in registers.
2. `split` warps share the same rows: warp s takes the blocks s, s + split, ... Their sums are added in shared memory,
   one warp after the other. `split` depends on the weight alone. So a token's bits depend neither on the other tokens
   of its batch nor on their number.

Bytes moved: the weights, N K, once for every 64 tokens; M K codes and M K / block_size scales once a block of threads,
from L2. Not yet measured on a GPU. On devices before sm_80 an mma of 16 rows is four smaller ones.

Each code is loaded alone if rows or addresses are not multiples of 16 bytes: correct, and slow.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda.epilogue import make_epilogue, shared_products
from cuda_kernels.cuda.int8_operands import Operands, epilogue_arguments, epilogue_types
from cuda_kernels.cuda.int8_skinny import LEAST_CAPABILITY, STEP, THREADS, WARPS
from cuda_kernels.cuda.launch import Kernel, Launch
from cuda_kernels.cuda.ptx.products import VECTOR, Turn, add_mma_floats, load_rows, mma_tile, scale_mma_tile

_device = cuda.jit(device=True, inline="always")


class Plan(NamedTuple):
    """The sizes that cut the work, all of them compiled in.

    token_tiles: tiles of 8 tokens of a block, 1, 2, 4 or 8. row_tiles: tiles of 16 weight rows of a warp. split: warps
    that share the same rows, whatever the number of tokens. A block's tokens times its features may not exceed 4096.
    """

    token_tiles: int
    row_tiles: int
    split: int


def plan(n_tokens: int, n_features: int, n_columns: int, block_size: int) -> Plan:
    """Choose as many warps to a row as fill the device. A guess, not yet measured."""
    token_tiles = next((t for t in (1, 2, 4) if n_tokens <= 8 * t), 8)
    splits = [s for s in (2, 4, 8) if n_columns > (s - 1) * block_size]
    split = next((s for s in splits if n_features * s >= 2 * 132 * WARPS * 16), splits[-1] if splits else 2)
    return Plan(token_tiles, 1, split)


def _make_sweep(cut: Plan, block_size: int, is_aligned: bool, is_turing: bool) -> Any:
    """Make (weight_codes, codes, x_absmax, row, token, part, q, M, N, K) -> the sums of a warp's blocks of columns."""
    turn = Turn(block_size // STEP, STEP, is_aligned)
    rows, tokens = (2 * cut.row_tiles, 8), (cut.token_tiles, 8)
    load_weights = load_rows(*rows, turn, is_read_once=True, is_inside=is_aligned)
    load_tokens = load_rows(*tokens, turn, is_read_once=False, is_inside=is_aligned)
    load_last_weights = load_rows(*rows, turn, is_read_once=True, is_inside=False)
    load_last_tokens = load_rows(*tokens, turn, is_read_once=False, is_inside=False)
    multiply, scale = mma_tile(turn.in_flight, is_turing), scale_mma_tile(cut.token_tiles)
    n_products, split = 4 * cut.row_tiles * cut.token_tiles, cut.split
    zeros, no_sums = (np.int32(0),) * n_products, (np.float32(0),) * n_products
    # If every code is loaded alone, each is compared with K, and all turns are alike.
    reach = block_size if is_aligned else 1

    @_device
    def sweep(weight_codes, codes, x_absmax, row, token, part, q, M, N, K):  # type: ignore[no-untyped-def]
        # The products of lane 4 g + q are of the tokens 2 q and 2 q + 1, its codes of the token g.
        scaled_token = token - cuda.threadIdx.x % 32 // 4 + 2 * q
        sums, b, n_blocks = no_sums, part, (K + block_size - 1) // block_size
        while b * block_size + reach <= K:
            at = b * block_size + q * VECTOR
            weights = load_weights(weight_codes, row, at, N, K)
            products = multiply(zeros, weights, load_tokens(codes, token, at, M, K))
            sums = scale(sums, products, x_absmax, scaled_token, M, n_blocks, b)
            b += split
        if b < n_blocks:
            at = b * block_size + q * VECTOR
            weights = load_last_weights(weight_codes, row, at, N, K)
            products = multiply(zeros, weights, load_last_tokens(codes, token, at, M, K))
            sums = scale(sums, products, x_absmax, scaled_token, M, n_blocks, b)
        return sums

    return sweep


@cache
def _kernel(dtype: str, cut: Plan, block_size: int, is_aligned: bool, is_turing: bool) -> Kernel:
    token_tiles, row_tiles, split = cut
    groups, rows = WARPS // split, 16 * row_tiles
    tile_tokens, tile_features = 8 * token_tiles, groups * rows
    stride = tile_features + 4  # as in `int8_skinny`
    n_sums, add_sums = tile_tokens * stride, add_mma_floats(token_tiles, stride)
    sweep = _make_sweep(cut, block_size, is_aligned, is_turing)
    epilogue = make_epilogue(tile_tokens, tile_features, THREADS, shared_products(stride), is_scaled=True)

    def int8_blocks(  # type: ignore[no-untyped-def]
        codes, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight,
        bias, y, has_bias, M, N, K, n, capacity,
    ):  # fmt: skip
        # codes int8 [M, K]; x_absmax [M, blocks]; weight_codes int8 [N, K]; y [M, N]; the rest as in `Operands`.
        # Grid: tiles of features x tiles of tokens. Lane 4 g + q is at rows and tokens g, at columns 16 q.
        shared_sums = cuda.shared.array(n_sums, types.float32, alignment=16)
        for i in range(cuda.threadIdx.x, n_sums, THREADS):
            shared_sums[i] = np.float32(0)
        first_feature = cuda.blockIdx.x * tile_features
        first_token = cuda.blockIdx.y * tile_tokens
        g, q, warp = cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4, cuda.threadIdx.x // 32
        row_of_tile = warp % groups * rows + g
        row, token, part = first_feature + row_of_tile, first_token + g, warp // groups
        sums = sweep(weight_codes, codes, x_absmax, row, token, part, q, M, N, K)
        for s in range(split):
            cuda.syncthreads()
            if part == s:
                add_sums(shared_sums, 2 * q * stride + row_of_tile, sums)
        cuda.syncthreads()
        terms = (outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
        epilogue(shared_sums, first_token, first_feature, x_absmax, terms, bias, has_bias, y, (M, N, K, n, capacity))

    return Kernel(int8_blocks, (types.CPointer(types.int8), *epilogue_types(dtype)), THREADS)


def launches(operands: Operands, capability: tuple[int, int], cut: Plan | None = None) -> list[Launch]:
    """Plan one launch, for any number of tokens, 8 `token_tiles` at a time."""
    o = operands
    block_size, is_turing = o.x.block_size, capability < LEAST_CAPABILITY
    cut = cut or plan(o.n_tokens, o.n_features, o.n_columns, block_size)
    kernel = _kernel(o.dtype, cut, block_size, o.is_aligned, is_turing)
    grid = (-(-o.n_features // (WARPS // cut.split * 16 * cut.row_tiles)), -(-o.n_tokens // (8 * cut.token_tiles)), 1)
    return [Launch(kernel, grid, 0, (o.x.codes, *epilogue_arguments(o)))]
