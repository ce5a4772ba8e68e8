"""The values of low-bit floats, by code.

Source: OCP 8-bit Floating Point Specification (OFP8), OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from int8convert.errors import CorruptFileError
from int8convert.text import quoted

Values = npt.NDArray[np.float32]

E2M1: Values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The 16 values of a 4-bit float."""

E8M0_DTYPES = frozenset({"F8_E8M0", "U8"})
"""Dtypes that hold the biased exponents of powers of two."""


def fp8_values(dtype: str) -> Values:
    """Return the 256 values of an FP8 dtype, F8_E4M3 or F8_E5M2."""
    n_mantissa, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    codes = np.arange(256)
    exponent, mantissa = (codes & 0x7F) >> n_mantissa, codes & ((1 << n_mantissa) - 1)
    steps = np.where(exponent > 0, (1 << n_mantissa) + mantissa, mantissa)
    values = np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - bias - n_mantissa)
    if dtype == "F8_E4M3":  # no infinity; one magnitude is NaN
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[(exponent == 31) & (mantissa == 0)] = np.inf
        values[(exponent == 31) & (mantissa > 0)] = np.nan
    signed: Values = np.where(codes & 0x80, -values, values).astype(np.float32)
    return signed


def e8m0_values(exponents: npt.NDArray[np.uint8], name: str) -> Values:
    """Return powers of two from their biased exponents, exactly; the least is a subnormal.

    Args:
        name: of the tensor, for the error.

    Raises:
        CorruptFileError: one is 255, which is NaN; transformers would read it as infinity.
    """
    if (exponents == 255).any():
        raise CorruptFileError(
            f"the scale {quoted(name)} holds the exponent 255, which stands for NaN",
            "fetch the checkpoint again, or convert its 16-bit version",
        )
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127).astype(np.float32)
