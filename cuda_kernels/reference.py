"""The meaning of every kernel, in NumPy: slow, obvious, and what the fast kernels are tested against.

Source: LLM.int8(), arXiv:2208.07339, Sec. 2. The order of the floating-point operations is that of torch for
`127.0 / t`. It decides ties, so it is part of the meaning.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

N_STEPS = 127
"""The largest code. Codes run from -127 to 127; -128 never occurs."""

T = TypeVar("T")
"""What stands for an array: a NumPy array here and in `cpu`, a tensor in `ops`, an address in `cuda`."""

OUTLIER_THRESHOLD = 6.0
"""The magnitude from which an activation makes its column an outlier column (Sec. 3.2)."""


class QuantizedRows(NamedTuple, Generic[T]):
    """Rows as codes, and the error of rounding them.

    codes: int8 [rows, cols].
    absmax: float32 [rows]; infinite or NaN if the row holds such a value, and then the row's codes mean nothing.
    signal: float64 [rows], the sum of (weight / scale)^2, in steps. The CUDA kernels sum in float32.
    noise: float64 [rows], the sum of (weight / scale - code)^2, in steps; noise / signal is the relative squared error.
    """

    codes: T
    absmax: T
    signal: T
    noise: T


def row_quantize(weight: npt.NDArray[np.float32]) -> QuantizedRows[npt.NDArray[Any]]:
    """Quantize each row symmetrically to 127 steps of its own absolute maximum.

        absmax[i]    = max_k |weight[i, k]|
        inv_scale[i] = fl32(fl32(1 / absmax[i]) * 127)
        codes[i, k]  = rint(fl32(weight[i, k] * inv_scale[i]))      ties to even

    A row whose inv_scale would overflow (all zero, or absmax under about 3.7e-37) gets the codes 0: its values are too
    small to matter beside any activation. NaN and infinity are not refused; they show in `absmax`.

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


def rotate(values: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Multiply each block of `size` adjacent columns by the regular Hadamard matrix of that size.

    The matrix is orthogonal, symmetric and its own inverse, and all its entries are 1 / sqrt(size) in magnitude. So a
    value that stands out is spread over its block. Each of its rows adds up to 1: a block of equal values stays as it
    is, and so does the mean of a block. That of size 4 is below, and that of 4 * n is its Kronecker product with that
    of n.

            [ 1  1  1 -1]
        1/2 [ 1  1 -1  1]       y[i] = (x[0] + x[1] + x[2] + x[3]) / 2 - x[3 - i]
            [ 1 -1  1  1]
            [-1  1  1  1]

    The fast transform takes one such step for each factor of 4, from neighbours to the widest distance. Its roundings
    are part of the meaning: fl32(fl32(fl32(x0 + x1) + fl32(x2 + x3)) / 2 - x).

    Args:
        values: float32 [rows, cols]; `size` divides cols. Not changed.
        size: a power of 4; 1 changes nothing.
    """
    rotated = np.array(values, np.float32)
    distance = 1
    while distance < size:
        x = rotated.reshape(-1, 4, distance)
        half = ((x[:, 0] + x[:, 1]) + (x[:, 2] + x[:, 3])) * np.float32(0.5)
        rotated = half[:, None] - x[:, ::-1]
        distance *= 4
    return rotated.reshape(values.shape)


def hadamard(values: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Multiply each block of `size` adjacent columns by Sylvester's Hadamard matrix over sqrt(size).

    It is the rotation that other libraries mean by a Hadamard transform. Like that of `rotate` it is orthogonal and
    symmetric, but its first row is constant, so it moves the mean of a block into the block's first column.

    The steps are sums and differences from neighbours to the widest distance, then one product with
    fl32(1 / sqrt(size)). Their roundings are part of the meaning.

    Args:
        values: float32 [rows, cols]; `size` divides cols. Not changed.
        size: a power of 2.
    """
    sums = np.array(values, np.float32)
    distance = 1
    while distance < size:
        x = sums.reshape(-1, 2, distance)
        sums = np.stack((x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]), axis=1)
        distance *= 2
    return (sums * np.float32(size**-0.5)).reshape(values.shape)


def feedback_round(
    in_steps: npt.NDArray[np.floating[Any]], feedback: npt.NDArray[np.floating[Any]], limit: float
) -> npt.NDArray[np.float64]:
    """Round rows column by column; each column passes its error on to the columns after it. Return the errors.

        target[i, k] = in_steps[i, k] + sum_{j < k} errors[i, j] * feedback[j, k]
        codes[i, k]  = the integer nearest to target[i, k], ties to even, of those within `limit` of in_steps[i, k]
        errors[i, k] = in_steps[i, k] - codes[i, k]

    Let H be the sum of x x^T over inputs x, H = R R^T with R upper triangular, and feedback[j, k] = R[j, k] / R[k, k].
    The squared error of a row's outputs is then sum_k (R[k, k] * (target[k] - codes[k]))^2, so each code is the best
    after the codes before it, as in GPTQ (arXiv:2210.17323, Alg. 1), whose Cholesky factor of H^-1 is R^-1.

    Args:
        in_steps: [rows, cols], weights divided by the step of their row.
        feedback: [cols, cols]; only what is above the diagonal is read.
        limit: at least 0.5; the backends sum in float32.
    """
    errors = np.zeros(in_steps.shape)
    for k in range(in_steps.shape[1]):
        exact = in_steps[:, k].astype(np.float64)
        codes = np.rint(exact + errors[:, :k] @ feedback[:k, k])
        errors[:, k] = exact - np.clip(codes, np.ceil(exact - limit), np.floor(exact + limit))
    return errors


def dequantize_packed(
    codes: npt.NDArray[np.uint8],
    bits: int,
    values: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    block: tuple[int, int],
    n_columns: int,
) -> npt.NDArray[np.float32]:
    """Packed codes to weights: `weight[i, k] = fl32(fl32(values[code] - zero of its block) * scale of its block)`.

    Args:
        codes: uint8 [rows, bytes]; code k of a row is its bits [k * bits, (k + 1) * bits), the lowest bit of a byte
            first. The first row is row `first_row` of the matrix.
        bits: 2 to 8.
        values: float32 [2**bits], the value of each code.
        zeros, scale: float32 [block rows, block columns] of the whole matrix.
        block: how many rows and columns share a scale; the last block may be smaller.
        n_columns: codes of a row; the bits after them are not read.
    """
    flat = np.unpackbits(codes, axis=1, bitorder="little")[:, : n_columns * bits]
    numbers = np.packbits(flat.reshape(len(codes), n_columns, bits), axis=2, bitorder="little")[..., 0]
    rows, columns = (first_row + np.arange(len(codes))) // block[0], np.arange(n_columns) // block[1]
    weight: npt.NDArray[np.float32] = (values[numbers] - zeros[rows][:, columns]) * scale[rows][:, columns]
    return weight


def dequantize_reordered(
    codes: npt.NDArray[np.uint8],
    bits: int,
    values: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    groups: npt.NDArray[np.int32],
) -> npt.NDArray[np.float32]:
    """`dequantize_packed` of codes whose groups are not contiguous.

    Args:
        zeros, scale: float32 [rows, groups] of the whole matrix.
        groups: int32 [columns], the group of each column.
    """
    rows = slice(first_row, first_row + len(codes))
    one_a_column = (0, (1, 1), len(groups))
    return dequantize_packed(codes, bits, values, zeros[rows][:, groups], scale[rows][:, groups], *one_a_column)


class QuantizedActivations(NamedTuple, Generic[T]):
    """Tokens as codes, and the columns that stay as they are; K input features, M tokens.

    codes: int8 [M, K]; 0 in every outlier column, stored or found.
    absmax: float32 [M, blocks], of each block of columns over those that are neither; infinite or NaN if such a value
        remains in them.
    outlier_x: [M, n], in the dtype of x: its stored outlier columns.
    found_columns: int32 [capacity], ascending: outlier columns found in x itself; -1 after the last.
    n_found: int32 [1], the number found. If above capacity, columns past the list were quantized like any other.
    found_x: [M, capacity], in the dtype of x: its found columns; 0 after the last.
    block_size: adjacent columns that share a scale, the last block may have fewer; 0 for all columns, which are then
        one block.
    """

    codes: T
    absmax: T
    outlier_x: T
    found_columns: T
    n_found: T
    found_x: T
    block_size: int = 0


class QuantizedWeight(NamedTuple, Generic[T]):
    """The weight of a Linear layer as codes, and its stored outlier columns; N output features.

    codes: int8 [N, K].
    absmax: float32 [N].
    outlier_weight: [N, n], in the dtype of x: the stored outlier columns before quantization.
    bias: [N], in the dtype of x, or None.
    """

    codes: T
    absmax: T
    outlier_weight: T
    bias: T | None


def n_blocks(n_columns: int, block_size: int) -> int:
    """Return into how many blocks a token's columns fall; see `QuantizedActivations.block_size`."""
    return max(1, -(-n_columns // block_size)) if block_size else 1


def activation_quantize(
    x: npt.NDArray[Any], outlier_columns: npt.NDArray[np.int32], threshold: float, capacity: int, block_size: int = 0
) -> QuantizedActivations[npt.NDArray[Any]]:
    """Quantize each block of each token symmetrically to 127 steps, outlier columns set aside.

        found    = { k not in outlier_columns : some token has not (|x[t, k]| < threshold) }     NaN is found, too
        absmax   = over a block's columns in neither set, per token; codes as in `row_quantize`

    An empty `outlier_columns` is the paper's rule (dynamic). `capacity` 0 is a stored set alone (static). Both together
    guard a stored set against inputs that its calibration did not see. absmax is the paper's row maximum, over the
    columns left in int8; bitsandbytes takes it over all elements below the threshold, outlier columns included.

    With blocks, a large activation widens the steps of its own block alone. The paper has one block, the whole token.

    Args:
        x: float16 or float32 [M, K]; bf16 values are widened to float32 first, which is exact.
        outlier_columns: int32 [n], ascending, each once.
        threshold: in the units of x, positive. Ignored if `capacity` is 0.
        capacity: how many columns may be found; the first ones are listed.
        block_size: see `QuantizedActivations`.
    """
    n_tokens, n_columns = x.shape
    is_stored = np.zeros(n_columns, bool)
    is_stored[outlier_columns] = True
    found = np.flatnonzero((~(np.abs(x) < threshold)).any(axis=0) & ~is_stored) if capacity else np.empty(0, int)
    n_found, taken = found.size, found[:capacity]
    rest = x.astype(np.float32)
    rest[:, is_stored] = 0
    rest[:, taken] = 0
    step = block_size or max(1, n_columns)
    blocks = [row_quantize(rest[:, k : k + step]) for k in range(0, max(1, n_columns), step)]
    found_columns = np.full(capacity, -1, np.int32)
    found_columns[: taken.size] = taken
    found_x = np.zeros((n_tokens, capacity), x.dtype)
    found_x[:, : taken.size] = x[:, taken]
    return QuantizedActivations(
        np.concatenate([block.codes for block in blocks], axis=1),
        np.stack([block.absmax for block in blocks], axis=1),
        x[:, outlier_columns],
        found_columns,
        np.array([n_found], np.int32),
        found_x,
        block_size,
    )


def dequantize_epilogue(
    products: npt.NDArray[np.int64],
    x: QuantizedActivations[npt.NDArray[Any]],
    weight: QuantizedWeight[npt.NDArray[Any]],
) -> npt.NDArray[np.float64]:
    """Convert integer products to outputs: scales, outlier terms, bias.

        y[t, n] = sum_b products[b, t, n] * x.absmax[t, b] / 127 * weight.absmax[n] / 127
                + sum_j x.outlier_x[t, j] * weight.outlier_weight[n, j]
                + sum_j x.found_x[t, j] * weight.codes[n, x.found_columns[j]] * weight.absmax[n] / 127
                + weight.bias[n]

    In float64 here; the backends sum in float32, blocks in ascending order, and round once, to the dtype of x.

    Args:
        products: int64 [blocks, M, N], see `block_products`.
    """
    n_taken = min(int(x.n_found[0]), x.found_columns.size)
    weight_scale = weight.absmax.astype(np.float64) / N_STEPS
    found_weight = weight.codes[:, x.found_columns[:n_taken]] * weight_scale[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        y: npt.NDArray[np.float64] = np.sum(products * (x.absmax.T.astype(np.float64) / N_STEPS)[:, :, None], axis=0)
        y *= weight_scale
        y += x.outlier_x.astype(np.float64) @ weight.outlier_weight.astype(np.float64).T
        y += x.found_x[:, :n_taken].astype(np.float64) @ found_weight.T
        return y if weight.bias is None else y + weight.bias.astype(np.float64)


def block_products(
    x: QuantizedActivations[npt.NDArray[Any]], weight: QuantizedWeight[npt.NDArray[Any]]
) -> npt.NDArray[np.int64]:
    """Return the integer products of each block of columns, int64 [blocks, M, N]."""
    n_columns = x.codes.shape[1]
    step = x.block_size or max(1, n_columns)
    blocks = [slice(k, k + step) for k in range(0, max(1, n_columns), step)]
    # By way of float64, which is exact below 2^53, and has a fast product.
    products = [x.codes[:, b].astype(np.float64) @ weight.codes[:, b].astype(np.float64).T for b in blocks]
    return np.stack(products).astype(np.int64)


def int8_matmul(
    x: QuantizedActivations[npt.NDArray[Any]], weight: QuantizedWeight[npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    """Return the decomposed product x @ W.T + bias, [M, N]; see `dequantize_epilogue`.

    The sum of int8 products fits int32 up to 133,144 input features, and float32 exactly only up to 1,040.
    """
    return dequantize_epilogue(block_products(x, weight), x, weight)
