"""The int8 product of up to 8 tokens on the GPU: one pass over the weights, with dp4a, the epilogue fused.

    products[t, n] = sum_k codes[t, k] * weight_codes[n, k]        int32, exact, in any order
    y              = as in `dequantize_epilogue`

1. A warp takes a few rows of the weight (`rows`) and all of the tokens; a lane takes 16 columns at a time of each.
2. It asks for `in_flight` such steps of all its rows before it uses the first: at 4.3 TB/s and some 700 ns, an H200
   wants 3 MB under way, 23 KB a multiprocessor. The weights are read once and pass by the L1 cache, where the
   tokens' codes, which every warp reads, stay.
3. Where rows are few, `split` warps share them and take turns along the columns. Their sums meet in shared memory;
   integers come out the same in any order.
4. `rows * tokens` sums of 32 lanes are folded into one another, so that each lane ends with the sum of one.

Bytes moved: the weights, N K, once; M K codes once a block, from L2. Floor on an H200 at 4.3 TB/s: N = K = 9216 20 us,
9216 x 36864 79 us, whatever M is. At M = 8, dp4a takes about two thirds of that time on its own. Not yet measured on a
GPU.

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
from cuda_kernels.intrinsics import load_16_bytes, stream_16_bytes
from cuda_kernels.launch import Kernel, Launch

WARPS = 8
VECTOR = 16
"""Codes a lane reads at once, in bytes."""
STEP = 32 * VECTOR
"""Codes of a row that a warp reads at once."""

_device = cuda.jit(device=True, inline="always")


class Plan(NamedTuple):
    """How the work is cut; all are compiled in.

    tokens: 1, 2, 4 or 8, of a block. rows: of the weight, of a warp. in_flight: steps asked for before the first is
    used. split: warps that share the same rows; `8 // split * rows`, a block's features, must be a multiple of 4.
    """

    tokens: int
    rows: int
    in_flight: int
    split: int


def plan(n_tokens: int, n_features: int, n_columns: int) -> Plan:
    """Eight vectors in flight a lane, and warps enough to fill the device: a guess, not yet measured."""
    tokens = next((t for t in (1, 2, 4) if n_tokens <= t), 8)
    rows = 2 if tokens <= 2 else 4
    # Four blocks of 256 threads on each of 132 multiprocessors, unless that leaves a warp less than a step.
    splits = [s for s in (1, 2, 4) if s == 1 or n_columns >= s * STEP]
    split = next((s for s in splits if n_features * s >= 4 * 132 * WARPS * rows), splits[-1])
    return Plan(tokens, rows, 8 // rows, split)


def make_load(is_aligned: bool, load_vector: Any) -> Any:
    """(codes, row, k, n_rows, K) -> 16 codes of a row from column k on as 4 words; zeros from column K on, and the last
    row where there are no more. `load_vector` reads 16 bytes."""

    @_device
    def load_aligned(codes, row, k, n_rows, K):  # type: ignore[no-untyped-def]
        start = min(row, n_rows - uint64(1)) * K
        return tile.keep(load_vector(codes, start + min(k, K - uint64(VECTOR))), k < K)

    @_device
    def load_any(codes, row, k, n_rows, K):  # type: ignore[no-untyped-def]
        start = min(row, n_rows - uint64(1)) * K
        return tile.gather16(codes, start + k, start + K)

    return load_aligned if is_aligned else load_any


def make_load_rows(load: Any, count: int, apart: int) -> Any:
    """`load`, of `count` rows that are `apart` rows apart: 4 words each."""
    if count == 1:
        return load
    load_rest = make_load_rows(load, count - 1, apart)

    @_device
    def load_rows(codes, row, k, n_rows, K):  # type: ignore[no-untyped-def]
        return load(codes, row, k, n_rows, K) + load_rest(codes, row + uint64(apart), k, n_rows, K)

    return load_rows


def make_steps(load_rows: Any, load_tokens: Any, multiply: Any, in_flight: int, step: int) -> Any:
    """`in_flight` steps along the columns: each asks for its rows before the next does, and multiplies after it."""
    if in_flight == 0:

        @_device
        def no_step(sums, weight_codes, codes, row, token, k, M, N, K):  # type: ignore[no-untyped-def]
            return sums

        return no_step
    rest = make_steps(load_rows, load_tokens, multiply, in_flight - 1, step)

    @_device
    def steps(sums, weight_codes, codes, row, token, k, M, N, K):  # type: ignore[no-untyped-def]
        rows = load_rows(weight_codes, row, k, N, K)
        sums = rest(sums, weight_codes, codes, row, token, k + uint64(step), M, N, K)
        return multiply(sums, rows, load_tokens(codes, token, k, M, K))

    return steps


@cache
def _kernel(dtype: str, cut: Plan, is_aligned: bool) -> Kernel:
    tokens, rows, in_flight, split = cut
    groups = WARPS // split
    tile_tokens, tile_features = -(-tokens // 4) * 4, groups * rows
    stride = tile_features + 4
    n_products, threads = tile_tokens * stride, 32 * WARPS
    load_rows = make_load_rows(make_load(is_aligned, stream_16_bytes), rows, 1)
    load_tokens = make_load_rows(make_load(is_aligned, load_16_bytes), tokens, 1)
    steps = make_steps(load_rows, load_tokens, tile.dp4a_tile, in_flight, STEP)
    epilogue = ending.make_epilogue(tile_tokens, tile_features, threads, ending.shared_products(stride))
    zeros, lanes_per_sum, turn = (np.int32(0),) * (tokens * rows), 32 // (tokens * rows), in_flight * STEP

    def int8_gemv(codes, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax,
                  outlier_weight, bias, y, has_bias, M, N, K, n, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        # codes int8 [M, K]; weight_codes int8 [N, K]; y [M, N]; the rest as in `Operands`.
        # Grid: tiles of features x tiles of tokens. A warp's place: which of the tile's rows, which turn.
        products = cuda.shared.array(n_products, types.int32, alignment=16)
        for i in range(cuda.threadIdx.x, n_products, threads):
            products[i] = 0
        cuda.syncthreads()
        first_feature = uint64(cuda.blockIdx.x) * uint64(tile_features)
        first_token = uint64(cuda.blockIdx.y) * uint64(tokens)
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        group = warp % groups
        row = first_feature + uint64(group * rows)
        sums = zeros
        k = uint64(warp // groups * turn)
        while k < K:
            at = k + uint64(lane * VECTOR)
            sums = steps(sums, weight_codes, codes, row, first_token, at, M, N, K)
            k += uint64(split * turn)
        total, i = tile.warp_sums(sums), lane // lanes_per_sum
        if lane % lanes_per_sum == 0:
            cuda.atomic.add(products, i // rows * stride + group * rows + i % rows, total)
        cuda.syncthreads()
        epilogue(products, first_token, first_feature, x_absmax, outlier_x, found_columns, n_found, found_x,
                 weight_codes, weight_absmax, outlier_weight, bias, y, has_bias, M, N, K, n, capacity)  # fmt: skip

    signature = (types.CPointer(types.int8), *ending.epilogue_types(dtype))
    return Kernel(int8_gemv, signature, threads)


def launches(operands: ending.Operands, cut: Plan | None = None) -> list[Launch]:
    """One launch; any number of tokens, of which it takes `tokens` at a time."""
    o = operands
    cut = cut or plan(o.n_tokens, o.n_features, o.n_columns)
    is_aligned = (o.codes | o.weight_codes | o.n_columns) % VECTOR == 0
    kernel = _kernel(o.dtype, cut, is_aligned)
    grid = (-(-o.n_features // (WARPS // cut.split * cut.rows)), -(-o.n_tokens // cut.tokens), 1)
    return [Launch(kernel, grid, 0, (o.codes, *ending.epilogue_arguments(o)))]
