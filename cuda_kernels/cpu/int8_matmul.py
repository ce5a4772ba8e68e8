"""Codes times codes, and the epilogue while the sums are in the cache; `reference.int8_matmul` says what it means.

For each block of 32 weight rows: its side weights are widened once; then for every four tokens the block's products,
in int32 and exact, and their epilogue. Products never reach main memory; weights cross it once for every 128 tokens,
whose codes stay in the core's cache from block to block.

Cost: N * K bytes of weight codes read, the floor for few tokens; for many, M * N * K / 64 vector products.
Threads share the weight rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.dequantize_epilogue import N_ROWS, finish_token, load_rows, widen_side_x
from cuda_kernels.cpu.int8_products import N_TOKENS, multiply_block, sum_codes
from cuda_kernels.cpu.team import run_on_team
from cuda_kernels.cpu.threads import part_of, run_parts

_N_ROUND = 128
"""Tokens per round: at 4,096 columns 512 KiB, beside a block of weight rows of 128 KiB."""

_MIN_WORK = 1 << 23
"""Work that is worth a thread, about 40 us: a weight costs 8 units to read and one for every token."""


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
    codes: npt.NDArray[np.int8],
    x_absmax: npt.NDArray[np.float32],
    outlier_x: npt.NDArray[Any],
    found_columns: npt.NDArray[np.int32],
    n_found: npt.NDArray[np.int32],
    found_x: npt.NDArray[Any],
    weight_codes: npt.NDArray[np.int8],
    weight_absmax: npt.NDArray[np.float32],
    outlier_weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
    y: npt.NDArray[Any],
    n_threads: int = 1,
) -> None:
    """Write the decomposed product `y` = x @ W.T + bias; see `reference.int8_matmul` for the meaning.

    The integer sums are exact, the rest as in `dequantize_epilogue`, bit for bit.

    Args:
        codes, x_absmax, outlier_x, found_columns, n_found, found_x: what `activation_quantize` wrote.
        outlier_weight, bias, y: bits of the dtype of x. All arrays are C-contiguous.
    """
    n_tokens = codes.shape[0]
    offsets = np.empty(n_tokens, np.int32)
    sum_codes(codes, offsets)
    n_taken = min(int(n_found[0]), found_columns.size)
    side_x = np.empty((n_tokens, outlier_x.shape[1] + n_taken), np.float32)
    widen_side_x(outlier_x, found_x, side_x)
    if bias is None:
        bias = np.empty(0, outlier_weight.dtype)
    weight = (weight_codes, weight_absmax, outlier_weight)
    args = (codes, offsets, x_absmax, side_x, found_columns, weight, bias, y)
    n_worth = weight_codes.size * (8 + n_tokens) // _MIN_WORK + 1
    run_parts(_multiply, _multiply_on_team, args, n_worth, n_threads)
