"""The operations on arrays. They write arrays that the caller allocated, and release the GIL.

Floats are passed as their bits, see `BITS_DTYPE`. Those that take `n_threads` run on torch's threads, see `team`. The
others run on the calling thread, because their callers run one per core. Importing this module imports no Numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cuda_kernels.cpu.kernels.sizes import N_CODES, N_FLOATS, N_TILE_TOKENS, NO_MEMORY, NOT_ASCENDING
from cuda_kernels.cpu.objects import Kernel
from cuda_kernels.cpu.team import team
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

_ROW_QUANTIZE = Kernel("row_quantize", "row_quantize")
_DEQUANTIZE_PACKED = Kernel("dequantize_packed", "dequantize_packed")
_DEQUANTIZE_REORDERED = Kernel("dequantize_packed", "dequantize_reordered")
_ROTATE_COLUMNS, _ROTATE_ROWS = Kernel("rotate", "rotate_columns"), Kernel("rotate", "rotate_rows")
_FEEDBACK_ROUND = Kernel("feedback_round", "feedback_round")
_SQUARE_PRODUCTS = Kernel("feedback_round", "square_products")
_ACTIVATION_QUANTIZE = Kernel("activation_quantize", "activation_quantize")
_INT8_MATMUL = Kernel("int8_matmul", "int8_matmul")
_DEQUANTIZE_EPILOGUE = Kernel("dequantize_epilogue", "dequantize_epilogue")


def row_quantize(
    bits: npt.NDArray[Any],
    codes: npt.NDArray[np.int8],
    absmax: npt.NDArray[np.float32],
    signal: npt.NDArray[np.float64],
    noise: npt.NDArray[np.float64],
) -> None:
    """Quantize rows; see `reference.row_quantize`.

    Bit-equal to the reference in codes and absmax. `signal` and `noise` are summed in float32 within a row, so they
    agree to about 1e-4 relative.

    Args:
        bits: [rows, cols], in the array dtype that `BITS_DTYPE` gives for the source dtype.
        codes: int8 [rows, cols], written.
        absmax: float32 [rows], written; infinite or NaN if the row holds such a value.
        signal, noise: float64 [rows], written, in squared steps.
    """
    _ROW_QUANTIZE(bits, codes, absmax, signal, noise)


def dequantize_packed(
    codes: npt.NDArray[np.uint8],
    bits: int,
    values: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    block: tuple[int, int],
    weight: npt.NDArray[np.float32],
) -> None:
    """Write the values of packed codes to `weight`, float32 [rows, cols].

    Bit-equal to `reference.dequantize_packed`.
    """
    _DEQUANTIZE_PACKED(codes, bits, values, zeros, scale, first_row, block, weight)


def dequantize_reordered(
    codes: npt.NDArray[np.uint8],
    bits: int,
    values: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    groups: npt.NDArray[np.int32],
    weight: npt.NDArray[np.float32],
) -> None:
    """Write the values of packed codes whose groups are not contiguous to `weight`, float32 [rows, cols].

    Bit-equal to `reference.dequantize_reordered`.
    """
    _DEQUANTIZE_REORDERED(codes, bits, values, zeros, scale, first_row, groups, weight)


def rotate(values: npt.NDArray[np.float32], size: int, axis: int = -1) -> None:
    """Rotate blocks of `size` columns, or of rows, in place; see `reference.rotate`.

    Bit-equal to the reference.

    Args:
        values: float32 [rows, cols], C-contiguous; written.
        size: a power of 4 that divides the number of columns, or of rows.
        axis: 0 for blocks of rows, -1 for blocks of columns.
    """
    if axis == 0:
        _ROTATE_ROWS(values.reshape(-1), values.shape[1], size)
    else:
        _ROTATE_COLUMNS(values, size)


def panels(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return a matrix [k, n] as panels of columns, float32 [ceil(n / 32), k, 32], the last one filled with zeros."""
    n_rows, n_columns = matrix.shape
    laid_out = np.zeros((-(-n_columns // N_FLOATS), n_rows, N_FLOATS), np.float32)
    for panel, begin in zip(laid_out, range(0, n_columns, N_FLOATS), strict=True):
        columns = matrix[:, begin : begin + N_FLOATS]
        panel[:, : columns.shape[1]] = columns
    return laid_out


def feedback_round(
    in_steps: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    limit: float,
    errors: npt.NDArray[np.float32],
) -> None:
    """Round rows, and write what rounding leaves of each weight to `errors`; see `reference.feedback_round`.

    Sums in float32: a code differs from the reference's where its target is as near to another code.

    Args:
        in_steps, errors: float32 [rows, cols].
        feedback: float32 [cols, cols], in `panels`.
    """
    sums = np.empty((in_steps.shape[0], N_FLOATS), np.float32)
    _FEEDBACK_ROUND(in_steps, feedback, np.float32(limit), errors, sums)


def square_products(
    rows: npt.NDArray[np.float32], matrix: npt.NDArray[np.float32], squares: npt.NDArray[np.float64]
) -> None:
    """Write the squared length of each row's product with a matrix to `squares`, float64 [rows].

    Args:
        rows: float32 [rows, cols].
        matrix: float32 [cols, n], in `panels`.
    """
    _SQUARE_PRODUCTS(rows, matrix, squares, np.empty((rows.shape[0], N_FLOATS), np.float32))


def activation_quantize(
    x: npt.NDArray[Any],
    outlier_columns: npt.NDArray[np.int32],
    threshold: float,
    result: QuantizedActivations[npt.NDArray[Any]],
    n_threads: int = 1,
) -> None:
    """Quantize tokens; see `reference.activation_quantize`.

    Bit-equal to the reference on x widened to float32: `threshold` is rounded to float32, not to the dtype of x. The
    codes of a block whose absmax is not finite are 0.

    Args:
        x: bits [M, K], rows any distance apart, last stride 1.
        outlier_columns: int32 [n], ascending, each once.
        result: written; C-contiguous; `outlier_x` and `found_x` as bits. The size of `found_columns` is the capacity.

    Raises:
        ValueError: `outlier_columns` are not ascending column indices.
    """
    flat, row_stride = _flatten(x)
    columns, keep = (outlier_columns, result.found_columns), np.empty(x.shape[1], x.dtype)
    arrays = (result.codes, result.absmax, result.outlier_x, result.found_x)
    rule = (np.float32(threshold), keep)
    size = result.block_size or x.shape[1]
    n_found = _ACTIVATION_QUANTIZE(flat, row_stride, columns, *rule, arrays, size, team(n_threads))
    check(n_found, outlier_columns, x.shape[1])
    result.n_found[0] = n_found


def check(status: int, outlier_columns: Any, n_columns: int) -> None:
    """Raise what a kernel returned instead of its result.

    Raises:
        ValueError: `outlier_columns` are not ascending column indices.
    """
    if status == NOT_ASCENDING:
        found = "" if outlier_columns is None else f", found {outlier_columns.tolist()}"
        raise ValueError(f"expected ascending outlier columns below {n_columns}{found}")
    if status == NO_MEMORY:
        raise MemoryError("no memory for a Linear layer's codes")


def int8_matmul(
    x: QuantizedActivations[npt.NDArray[Any]],
    weight: QuantizedWeight[npt.NDArray[Any]],
    y: npt.NDArray[Any],
    n_threads: int = 1,
) -> None:
    """Write the decomposed product `y` = x @ W.T + bias; see `reference.int8_matmul`.

    The integer sums are exact. The rest has the bits of `dequantize_epilogue`.

    Args:
        x, weight: C-contiguous; floats of the dtype of x as their bits. A block has a multiple of 64 columns.
        y: bits [M, N] of the dtype of x, C-contiguous.
    """
    n_tokens, n_columns = x.codes.shape
    shape = x.absmax.shape[1], n_tokens + N_TILE_TOKENS
    offsets, scales = np.empty(shape, np.int32), np.empty(shape, np.float32)
    tokens = (x.codes, np.zeros((n_tokens, N_CODES), np.int8), x.block_size or n_columns, offsets, scales)
    rest = (_side(x), x.found_columns, weight[:3], _bias_or_empty(weight))
    check(_INT8_MATMUL(tokens, x.absmax, *rest, y.reshape(-1), y.shape[1], team(n_threads)), None, n_columns)


def dequantize_epilogue(
    products: npt.NDArray[np.int32],
    x: QuantizedActivations[npt.NDArray[Any]],
    weight: QuantizedWeight[npt.NDArray[Any]],
    y: npt.NDArray[Any],
    n_threads: int = 1,
) -> None:
    """Write `y` from the integer products; see `reference.dequantize_epilogue`.

    Args:
        products: int32 [M, N] over all columns, C-contiguous.
        x, weight, y: as for `int8_matmul`; x of one block; `x.codes` is not read.
    """
    rest = (_side(x), x.found_columns, weight[:3], _bias_or_empty(weight), y, team(n_threads))
    check(_DEQUANTIZE_EPILOGUE(products, x.absmax, *rest), None, x.codes.shape[1])


def _flatten(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """The memory of x as one row, and the stride of the rows of x in elements, without a copy."""
    n_tokens, n_columns = x.shape
    if x.flags.c_contiguous:
        return x.reshape(-1), n_columns
    row_stride = x.strides[0] // x.itemsize
    return as_strided(x, ((n_tokens - 1) * row_stride + n_columns,), (x.itemsize,)), row_stride


def _side(x: QuantizedActivations[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """The activations of the stored and of the found columns, and an array for both in float32, [M, n_side]."""
    n_taken = min(int(x.n_found[0]), x.found_columns.size)
    side_x = np.empty((x.absmax.shape[0], x.outlier_x.shape[1] + n_taken), np.float32)
    return x.outlier_x, x.found_x, side_x


def _bias_or_empty(weight: QuantizedWeight[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.empty(0, weight.outlier_weight.dtype) if weight.bias is None else weight.bias
