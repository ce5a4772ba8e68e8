"""What every kernel means, in NumPy: slow, obvious, and the judge of the fast ones.

Source: LLM.int8(), arXiv:2208.07339, Sec. 2; the order of the floating-point operations is torch's own for `127.0 / t`
and decides ties, so it is part of the meaning.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

N_STEPS = 127
"""Codes run from -127 to 127; -128 never occurs."""


class QuantizedRows(NamedTuple):
    """Rows as codes, and what they cost.

    codes: int8 [rows, cols].
    absmax: float32 [rows]; infinite or NaN where the row holds such a value, and then the row's codes mean nothing.
    signal: float64 [rows], the sum of (weight / scale)^2, in steps.
    noise: float64 [rows], the sum of (weight / scale - code)^2, in steps; noise / signal is the relative squared error.
    """

    codes: npt.NDArray[np.int8]
    absmax: npt.NDArray[np.float32]
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]


def row_quantize(weight: npt.NDArray[np.float32]) -> QuantizedRows:
    """Quantize each row symmetrically to 127 steps of its own absolute maximum.

        absmax[i]    = max_k |weight[i, k]|
        inv_scale[i] = fl32(fl32(1 / absmax[i]) * 127)
        codes[i, k]  = rint(fl32(weight[i, k] * inv_scale[i]))      ties to even

    A row whose inv_scale would overflow (all zero, or absmax under about 3.7e-37) gets the codes 0: what it loses is
    below any activation's reach. Does not refuse NaN and infinity: it shows them in `absmax`.

    Args:
        weight: float32 [rows, cols]; fp16 and bf16 values are widened first, which is exact.
    """
    rows = np.ascontiguousarray(weight, dtype=np.float32)
    absmax = np.abs(rows).max(axis=1, initial=np.float32(0))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inv_scale = (np.float32(1) / absmax) * np.float32(N_STEPS)
        inv_scale[~np.isfinite(inv_scale)] = 0
        in_steps = rows * inv_scale[:, None]
        codes = np.rint(in_steps)
        noise = np.square(in_steps.astype(np.float64) - codes).sum(axis=1)
        signal = np.square(in_steps.astype(np.float64)).sum(axis=1)
        return QuantizedRows(np.nan_to_num(codes).astype(np.int8), absmax, signal, noise)


def dequantize_fp8(
    codes: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    block_rows: int,
    block_columns: int,
) -> npt.NDArray[np.float32]:
    """FP8 codes to weights: `weight[i, k] = fl32(values[codes[i, k]] * scale of its block)`.

    Args:
        codes: uint8 [rows, cols], of a matrix from its row `first_row` on.
        values: float32 [256], what each code stands for.
        scale: float32 [block rows, block columns] of the whole matrix.
        block_rows, block_columns: how many rows and columns share a scale; the last block may be smaller.
    """
    rows = (first_row + np.arange(codes.shape[0])) // block_rows
    columns = np.arange(codes.shape[1]) // block_columns
    weight: npt.NDArray[np.float32] = values[codes] * scale[rows][:, columns]
    return weight
