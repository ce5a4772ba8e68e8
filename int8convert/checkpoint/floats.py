"""Conversions of float values by their bits. NumPy has no bf16, so its bits are held as int16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu

NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.int16),
}
"""NumPy dtype that holds the values of a float dtype."""

_EXPONENT_BITS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}


def kernel_bits(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return values as `cpu.row_quantize` takes them; F64 is rounded to float32 first, as torch does."""
    if dtype == "F64":
        values, dtype = values.astype(np.float32), "F32"
    return values.view(cpu.BITS_DTYPE[dtype])


def widen(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return float32 values; exact for all dtypes but F64, which is rounded."""
    if dtype == "BF16":
        return widen_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def widen_bfloat16(bits: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """Return bf16 values from their bits, exactly, in float32."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Return the bits of the nearest bf16 values, ties to even, as torch rounds; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16).view(np.int16)


def convert_floats(data: npt.NDArray[np.uint8], dtype: str, output_dtype: str) -> npt.NDArray[np.uint8]:
    """Return the bytes of float values in another float dtype, rounded to nearest even as torch rounds.

    By way of float32; what is too large for the new dtype becomes infinite, as it does when a loader casts.
    """
    values = data.view(NUMPY_DTYPE[dtype])
    wide = widen_bfloat16(values) if dtype == "BF16" else values
    if output_dtype == "BF16":
        return narrow_to_bfloat16(np.ascontiguousarray(wide, np.float32)).view(np.uint8)
    with np.errstate(over="ignore"):
        return wide.astype(NUMPY_DTYPE[output_dtype]).view(np.uint8)


def count_non_finite(data: npt.NDArray[np.uint8], dtype: str) -> int:
    """Count the values that are NaN or infinite: all exponent bits are set. 0 for other dtypes."""
    exponent = _EXPONENT_BITS.get(dtype)
    if exponent is None:
        return 0
    return int(np.count_nonzero((data.view(exponent.dtype) & exponent) == exponent))
