"""The int8 product with its epilogue fused, so that sums never leave the cache; see `reference.int8_matmul`.

For each block of 32 weight rows, the kernel widens the side weights once. Then, for every four tokens, it computes the
block's products, exact in int32, and their epilogue. Weights are read from memory once for every 128 tokens, whose
codes stay in the core's cache from block to block.

Cost: N * K bytes of weight codes read, the floor for few tokens; for many, M * N * K / 64 vector products.
Threads share the weight rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.dequantize_epilogue import N_ROWS, bias_or_empty, finish_token, load_rows, widened_side_x
from cuda_kernels.cpu.int8_products import N_TOKENS, multiply_block, sum_codes
from cuda_kernels.cpu.team import run_on_team
from cuda_kernels.cpu.threads import part_of, run_parts
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

_N_ROUND = 128
"""Tokens per round: at 4,096 columns their codes take 512 KiB, and a block of weight rows 128 KiB."""

_MIN_WORK = 1 << 23
"""Work that pays for a thread, about 40 us: 8 units for each weight read, and 1 for each product."""


@compiled()
def _multiply(codes, offsets, x_absmax, side_x, found_columns, weight, bias, y, part, n_parts):  # type: ignore[no-untyped-def]
    weight_codes, weight_absmax, outlier_weight = weight
    begin, end = part_of(weight_absmax.size, N_ROWS, part, n_parts)
    block = np.zeros((2 + side_x.shape[1], N_ROWS), np.float32)
    products, spare = np.zeros((N_TOKENS, N_ROWS), np.int32), np.empty(N_ROWS, y.dtype)
    for first in range(0, codes.shape[0], _N_ROUND):
        last = min(first + _N_ROUND, codes.shape[0])
        for n in range(begin, end, N_ROWS):
            stop = min(n + N_ROWS, end)
            load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, block)
            for t in range(first, last, N_TOKENS):
                n_tokens = min(N_TOKENS, last - t)
                multiply_block(codes, offsets, t, n_tokens, weight_codes, n, stop - n, products)
                for i in range(n_tokens):
                    finish_token(products[i], x_absmax[t + i], side_x[t + i], block, spare, y[t + i, n:stop])


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
    n_tokens = x.codes.shape[0]
    offsets = np.empty(n_tokens, np.int32)
    sum_codes(x.codes, offsets)
    side_x, bias = widened_side_x(x), bias_or_empty(weight)
    args = (x.codes, offsets, x.absmax, side_x, x.found_columns, weight[:3], bias, y)
    n_worth = weight.codes.size * (8 + n_tokens) // _MIN_WORK + 1
    run_parts(_multiply, _multiply_on_team, args, n_worth, n_threads)
