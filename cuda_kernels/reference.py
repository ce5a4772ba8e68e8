"""What every kernel means, in NumPy: slow, obvious, and the judge of the fast ones.

Source: LLM.int8(), arXiv:2208.07339, Sec. 2; the order of the floating-point operations is torch's own for `127.0 / t`
and decides ties, so it is part of the meaning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

N_STEPS = 127
"""Codes run from -127 to 127; -128 never occurs."""

OUTLIER_THRESHOLD = 6.0
"""An activation of at least this magnitude makes its column an outlier column (Sec. 3.2)."""


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


class QuantizedActivations(NamedTuple):
    """Tokens as codes beside the columns that stay as they are; K input features, M tokens.

    codes: int8 [M, K]; 0 in every outlier column, stored or found.
    absmax: float32 [M], over the columns that are neither; infinite or NaN where such a value is left in them.
    outlier_x: [M, n], in the dtype of x: its stored outlier columns.
    found_columns: int32 [capacity], ascending: outlier columns found in x itself; -1 after the last.
    n_found: int32 [1], how many there were; above capacity, the columns past the list were quantized like any other.
    found_x: [M, capacity], in the dtype of x: its found columns; 0 after the last.
    """

    codes: npt.NDArray[np.int8]
    absmax: npt.NDArray[np.float32]
    outlier_x: npt.NDArray[Any]
    found_columns: npt.NDArray[np.int32]
    n_found: npt.NDArray[np.int32]
    found_x: npt.NDArray[Any]


def activation_quantize(
    x: npt.NDArray[Any], outlier_columns: npt.NDArray[np.int32], threshold: float, capacity: int
) -> QuantizedActivations:
    """Quantize each token symmetrically to 127 steps, its outlier columns set aside.

        found    = { k not in outlier_columns : some token has not (|x[t, k]| < threshold) }     NaN is found, too
        absmax   = over the columns in neither set, per token; codes as in `row_quantize`

    The paper's rule is an empty `outlier_columns` (dynamic); a stored set alone is `capacity` 0 (static); both together
    guard a stored set against what its calibration did not see. Takes the paper's row maximum, over the columns left
    in int8; bitsandbytes takes it over all elements below the threshold, those in outlier columns included.

    Args:
        x: float16 or float32 [M, K]; bf16 values are widened to float32 first, which is exact.
        outlier_columns: int32 [n], ascending, each once.
        threshold: in the units of x, positive. Not looked at when `capacity` is 0.
        capacity: how many columns may be found; the first ones are taken.
    """
    n_tokens, n_columns = x.shape
    is_stored = np.zeros(n_columns, bool)
    is_stored[outlier_columns] = True
    found = np.flatnonzero((~(np.abs(x) < threshold)).any(axis=0) & ~is_stored) if capacity else np.empty(0, int)
    n_found, taken = found.size, found[:capacity]
    rest = x.astype(np.float32)
    rest[:, is_stored] = 0
    rest[:, taken] = 0
    rows = row_quantize(rest)
    found_columns = np.full(capacity, -1, np.int32)
    found_columns[: taken.size] = taken
    found_x = np.zeros((n_tokens, capacity), x.dtype)
    found_x[:, : taken.size] = x[:, taken]
    return QuantizedActivations(
        rows.codes, rows.absmax, x[:, outlier_columns], found_columns, np.array([n_found], np.int32), found_x
    )


def dequantize_epilogue(
    products: npt.NDArray[np.int64],
    x: QuantizedActivations,
    weight_codes: npt.NDArray[np.int8],
    weight_absmax: npt.NDArray[np.float32],
    outlier_weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
) -> npt.NDArray[np.float64]:
    """Integer products to outputs, in one pass over them: scales, outlier terms, bias.

        y[t, n] = products[t, n] * x_absmax[t] / 127 * weight_absmax[n] / 127
                + sum_j outlier_x[t, j] * outlier_weight[n, j]
                + sum_j found_x[t, j] * weight_codes[n, found_columns[j]] * weight_absmax[n] / 127
                + bias[n]

    In float64 here; the backends accumulate in float32 and round once, to the dtype of x.

    Args:
        products: int64 [M, N], `x.codes @ weight_codes.T`.
        weight_codes: int8 [N, K]. weight_absmax: float32 [N].
        outlier_weight: [N, n], the stored outlier columns of the unquantized weight.
        bias: [N], or None.
    """
    n_taken = min(int(x.n_found[0]), x.found_columns.size)
    weight_scale = weight_absmax.astype(np.float64) / N_STEPS
    found_weight = weight_codes[:, x.found_columns[:n_taken]] * weight_scale[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        y = products * (x.absmax.astype(np.float64) / N_STEPS)[:, None] * weight_scale
        y += x.outlier_x.astype(np.float64) @ outlier_weight.astype(np.float64).T
        y += x.found_x[:, :n_taken].astype(np.float64) @ found_weight.T
        return y if bias is None else y + bias.astype(np.float64)


def int8_matmul(
    x: QuantizedActivations,
    weight_codes: npt.NDArray[np.int8],
    weight_absmax: npt.NDArray[np.float32],
    outlier_weight: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None,
) -> npt.NDArray[np.float64]:
    """The decomposed product x @ W.T + bias of quantized activations: [M, N]; see `dequantize_epilogue`.

    The sum of int8 products fits int32 up to 133,144 input features, and a float32 sum of them only up to 1,040.
    """
    products = x.codes.astype(np.int64) @ weight_codes.astype(np.int64).T
    return dequantize_epilogue(products, x, weight_codes, weight_absmax, outlier_weight, bias)
