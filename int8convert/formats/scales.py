"""The conversion of a row's absmax to its scale and back, and of codes to weights.

bitsandbytes stores absmax; compressed-tensors and torchao store the scale, absmax / 127. The way back finds the number
that was divided, so that a checkpoint that went through all formats has its first bytes again.

The way back is not always exact. Division by 127 in float32 sends two neighbouring numbers to one quotient where the
mantissa begins with seven ones, which is 1.6 % of all float32 numbers, and leaves some quotients out. Of two,
the one with more trailing zero bits is taken: the right one for every fp16 and bf16 number, while 0.8 % of float32
numbers come back one unit in the last place away. A float32 scale of another tool may be no quotient: it becomes the
nearest absmax. A 16-bit scale always is one, since 127 times it is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.reference import N_STEPS

_MANTISSA_BITS = 23


def absmax_to_scale(absmax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return what a code is multiplied by: fl32(absmax / 127)."""
    return absmax / np.float32(N_STEPS)


def scale_to_absmax(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the absmax of a scale; of several, the one with the most trailing zero bits.

    A scale that is no quotient becomes fl32(scale * 127), the nearest absmax.

    Args:
        scale: float32 [rows], finite and not negative.
    """
    nearest = scale * np.float32(N_STEPS)
    near_bits = nearest.view(np.int32).astype(np.int64)
    found = nearest.copy()
    is_found = np.zeros(scale.shape, np.bool_)
    for n_zeros in range(_MANTISSA_BITS, -1, -1):
        floor = near_bits >> n_zeros
        for step in (0, 1, -1):
            bits = np.maximum((floor + step) << n_zeros, 0).astype(np.int32)
            candidate = bits.view(np.float32)
            fits = ~is_found & (absmax_to_scale(candidate) == scale)
            found[fits] = candidate[fits]
            is_found |= fits
    return found


def dequantize_by_absmax(codes: npt.NDArray[np.int8], absmax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return fl32(fl32(codes * absmax) * fl32(1 / 127)), the order and the constant of bitsandbytes.

    Args:
        codes: int8 [rows, cols].
        absmax: float32 [rows].

    Source: bitsandbytes/_ops.py, `int8_vectorwise_dequant`.
    """
    weight: npt.NDArray[Any] = codes.astype(np.float32)
    weight *= absmax[:, None]
    weight *= np.float32(1) / np.float32(N_STEPS)
    return weight


def dequantize_by_scale(codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return fl32(codes * scale), as compressed-tensors and torchao compute it.

    Args:
        codes: int8 [rows, cols].
        scale: float32 [rows].
    """
    weight: npt.NDArray[Any] = codes.astype(np.float32)
    weight *= scale[:, None]
    return weight
