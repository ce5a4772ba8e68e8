"""The int8 product of up to 8 tokens on the GPU: one pass over the weights, by dp4a, the epilogue fused.

    products[t, n] = sum_k codes[t, k] * weight_codes[n, k]        int32, exact, in any order
    y              = as in `epilogue`

1. A warp takes `rows` rows of the weight and all tokens. A lane takes 16 columns of each at a time.
2. It loads `in_flight` such steps of all its rows before it uses the first: at 4.3 TB/s and about 700 ns, an H200 needs
   3 MB in flight, 23 KB a multiprocessor. The weights are read once and bypass the L1 cache. The tokens' codes, which
   every warp reads, stay in it.
3. If rows are few, `split` warps share them and take turns along the columns. Their sums are added in shared memory;
   integer sums do not depend on the order.
4. The sums of 32 lanes are folded, so that each lane ends with the total of one sum.

Bytes moved: the weights, N K, once; M K codes once a block, from L2. Floor on an H200 at 4.3 TB/s: N = K = 9216 20 us,
9216 x 36864 79 us, for any M. Not yet measured on a GPU.

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
from cuda_kernels.cuda.launch import Kernel, Launch
from cuda_kernels.cuda.ptx.products import VECTOR, Turn, dp4a_tile, load_rows, warp_sums

WARPS = 8
THREADS = 32 * WARPS
STEP = 32 * VECTOR
"""Columns of a row that a warp reads at a time."""

_device = cuda.jit(device=True, inline="always")


class Plan(NamedTuple):
    """The sizes that cut the work, all of them compiled in.

    tokens: of a block, 1, 2, 4 or 8. rows: rows of the weight of a warp. in_flight: steps loaded before the first is
    used. split: warps that share the same rows. blocks: the fewest that a multiprocessor must hold, which bounds the
    registers. A block has `8 // split * rows` features, which must be a multiple of 4.
    """

    tokens: int
    rows: int
    in_flight: int
    split: int
    blocks: int


def plan(n_tokens: int, n_features: int, n_columns: int) -> Plan:
    """Choose the most loads in flight that registers allow, and warps to fill the device. A guess, not yet measured."""
    tokens = next((t for t in (1, 2, 4) if n_tokens <= t), 8)
    rows, most_in_flight, blocks = {1: (2, 4, 3), 2: (2, 4, 2), 4: (4, 2, 2), 8: (4, 1, 2)}[tokens]
    # Four blocks on each of 132 multiprocessors, unless that leaves a warp less than a step.
    splits = [s for s in (1, 2, 4) if s == 1 or n_columns > (s - 1) * STEP]
    split = next((s for s in splits if n_features * s >= 4 * 132 * WARPS * rows), splits[-1])
    return Plan(tokens, rows, fitting(most_in_flight, split * STEP, n_columns), split, blocks)


def fitting(most_in_flight: int, columns: int, n_columns: int) -> int:
    """The most steps in flight that leave every warp at least two turns, so that all end at about the same time."""
    return next((f for f in (4, 2) if f <= most_in_flight and n_columns >= 2 * f * columns), 1)


def make_sweep(rows: tuple[int, int], tokens: tuple[int, int], multiply: Any, turn: Turn, split: int) -> Any:
    """Make (sums, weight_codes, codes, row, token, first, column, M, N, K) -> a warp's sums over its share of columns.

    The warp takes every `split`-th turn from number `first` on. `column` is the lane's place in a step. Only the last
    turn, which may reach past K, compares columns with K.

    Args:
        rows, tokens: how many rows of the weight and how many tokens a lane reads, and their distance.
        multiply: (sums, words of the weight, words of the tokens) -> sums.
    """
    columns = turn.in_flight * turn.step
    # If every code is loaded alone, each is compared with K, and all turns are alike.
    reach = columns if turn.is_aligned else 1
    load_weights = load_rows(*rows, turn, is_read_once=True, is_inside=turn.is_aligned)
    load_tokens = load_rows(*tokens, turn, is_read_once=False, is_inside=turn.is_aligned)
    load_last_weights = load_rows(*rows, turn, is_read_once=True, is_inside=False)
    load_last_tokens = load_rows(*tokens, turn, is_read_once=False, is_inside=False)

    @_device
    def sweep(sums, weight_codes, codes, row, token, first, column, M, N, K):  # type: ignore[no-untyped-def]
        k = first * columns
        while k + reach <= K:
            weights = load_weights(weight_codes, row, k + column, N, K)
            sums = multiply(sums, weights, load_tokens(codes, token, k + column, M, K))
            k += split * columns
        if k < K:
            weights = load_last_weights(weight_codes, row, k + column, N, K)
            sums = multiply(sums, weights, load_last_tokens(codes, token, k + column, M, K))
        return sums

    return sweep


@cache
def _kernel(dtype: str, cut: Plan, is_aligned: bool) -> Kernel:
    tokens, rows, in_flight, split, _ = cut
    groups = WARPS // split
    tile_tokens, tile_features = -(-tokens // 4) * 4, groups * rows
    stride = tile_features + 4
    n_products, lanes = tile_tokens * stride, 32 // (tokens * rows)
    sweep = make_sweep((rows, 1), (tokens, 1), dp4a_tile(in_flight), Turn(in_flight, STEP, is_aligned), split)
    epilogue = make_epilogue(tile_tokens, tile_features, THREADS, shared_products(stride))
    zeros = (np.int32(0),) * (tokens * rows)

    def int8_gemv(  # type: ignore[no-untyped-def]
        codes, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight,
        bias, y, has_bias, M, N, K, n, capacity,
    ):  # fmt: skip
        # codes int8 [M, K]; weight_codes int8 [N, K]; y [M, N]; the rest as in `Operands`.
        # Grid: tiles of features x tiles of tokens.
        products = cuda.shared.array(n_products, types.int32, alignment=16)
        for i in range(cuda.threadIdx.x, n_products, THREADS):
            products[i] = 0
        cuda.syncthreads()
        first_feature = cuda.blockIdx.x * tile_features
        first_token = cuda.blockIdx.y * tokens
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        group = warp % groups
        row = first_feature + group * rows
        sums = sweep(zeros, weight_codes, codes, row, first_token, warp // groups, lane * VECTOR, M, N, K)
        total, i = warp_sums(sums), lane // lanes
        if lane % lanes == 0:
            cuda.atomic.add(products, i // rows * stride + group * rows + i % rows, total)
        cuda.syncthreads()
        terms = (outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
        sizes = (min(M, first_token + tokens), N, K, n, capacity)
        epilogue(products, first_token, first_feature, x_absmax, terms, bias, has_bias, y, sizes)

    return Kernel(int8_gemv, (types.CPointer(types.int8), *epilogue_types(dtype)), THREADS, cut.blocks)


def launches(operands: Operands, cut: Plan | None = None) -> list[Launch]:
    """Plan one launch, for any number of tokens, `tokens` at a time."""
    o = operands
    cut = cut or plan(o.n_tokens, o.n_features, o.n_columns)
    if not o.is_aligned:
        cut = cut._replace(in_flight=1, blocks=1)
    grid = (-(-o.n_features // (WARPS // cut.split * cut.rows)), -(-o.n_tokens // cut.tokens), 1)
    return [Launch(_kernel(o.dtype, cut, o.is_aligned), grid, 0, (o.x.codes, *epilogue_arguments(o)))]
