"""The operations as Numba CPU kernels: one thread, no Python lock held, so callers run as many as they have cores.

`row_quantize` reads a row twice, the second time from the core's own cache: the first pass finds the largest bit
pattern with the sign cleared (for IEEE formats that order is the order of magnitudes, with infinity and then NaN at the
top, so finiteness costs nothing), the second scales, rounds and sums the error. fp16 and bf16 are read as the bits they
are and widened in registers.

Cost: 2 bytes in and 1 out for a 16-bit weight. Left out on purpose: a thread pool. The callers own their threads, and
Numba's default threading layer may not be entered by two of them at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from cuda_kernels.reference import N_STEPS

BITS_DTYPE: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.uint16),
    "BF16": np.dtype(np.int16),
    "F32": np.dtype(np.uint32),
}
"""How each source dtype is handed to `row_quantize`: the integer type of its bits names the format."""


@intrinsic
def _widen(_context: Any, bits: Any) -> Any:
    """Bits of an fp16 (uint16), bf16 (int16) or fp32 (uint32) value -> float32, exactly."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        (value,) = args
        if bits == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if bits == types.int16:
            value = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits), codegen


@intrinsic
def _magnitude(_context: Any, bits: Any) -> Any:
    """The bits with the sign cleared; ordered as the magnitudes are."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        width = bits.bitwidth
        return builder.and_(args[0], ir.Constant(ir.IntType(width), (1 << (width - 1)) - 1))

    return bits(bits), codegen


# `reassoc` lets the two sums use whole vector registers. It stays out of the caller below, where LLVM would turn
# (1 / absmax) * 127 into 127 / absmax and move codes by one.
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
def _quantize_one_row(row, inv_scale, codes):  # type: ignore[no-untyped-def]
    signal = np.float32(0)
    noise = np.float32(0)
    for k in range(row.size):
        in_steps = _widen(row[k]) * inv_scale
        code = np.rint(in_steps)
        codes[k] = np.int8(code)
        signal += in_steps * in_steps
        noise += (in_steps - code) * (in_steps - code)
    return signal, noise


@njit(nogil=True, cache=True, error_model="numpy")
def _row_quantize(bits, codes, absmax, signal, noise):  # type: ignore[no-untyped-def]
    for r in range(bits.shape[0]):
        row = bits[r]
        largest = _magnitude(bits.dtype.type(0))
        for k in range(row.size):
            largest = max(largest, _magnitude(row[k]))
        absmax[r] = _widen(largest)
        inv_scale = (np.float32(1) / absmax[r]) * np.float32(N_STEPS)
        if not np.isfinite(inv_scale):
            inv_scale = np.float32(0)
        signal[r], noise[r] = _quantize_one_row(row, inv_scale, codes[r])


def row_quantize(
    bits: npt.NDArray[Any],
    codes: npt.NDArray[np.int8],
    absmax: npt.NDArray[np.float32],
    signal: npt.NDArray[np.float64],
    noise: npt.NDArray[np.float64],
) -> None:
    """Quantize rows into arrays the caller owns; see `reference.row_quantize` for the meaning.

    Bit-equal to the reference in codes and absmax. `signal` and `noise` are summed in float32 within a row, so they
    agree to about 1e-4 relative. Releases the Python lock.

    Args:
        bits: [rows, cols], C-contiguous, of the dtype `BITS_DTYPE` gives for the source dtype.
        codes: int8 [rows, cols], written.
        absmax: float32 [rows], written; infinite or NaN where the row holds such a value.
        signal, noise: float64 [rows], written, in squared steps.
    """
    _row_quantize(bits, codes, absmax, signal, noise)


@njit(nogil=True, cache=True, error_model="numpy")
def _dequantize_fp8(codes, values, scale, first_row, block_rows, block_columns, weight):  # type: ignore[no-untyped-def]
    for r in range(codes.shape[0]):
        scales = scale[(first_row + r) // block_rows]
        for b in range(scales.size):
            s = scales[b]
            for k in range(b * block_columns, min((b + 1) * block_columns, codes.shape[1])):
                weight[r, k] = values[codes[r, k]] * s


def dequantize_fp8(
    codes: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    block_rows: int,
    block_columns: int,
    weight: npt.NDArray[np.float32],
) -> None:
    """Turn FP8 codes into `weight`, float32 [rows, cols]; see `reference.dequantize_fp8` for the meaning.

    Bit-equal to the reference. Releases the Python lock.
    """
    _dequantize_fp8(codes, values, scale, first_row, block_rows, block_columns, weight)
