"""The array dtype that stands for each float dtype in the kernels, and the types of their arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

BITS_DTYPE: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.uint16),
    "BF16": np.dtype(np.int16),
    "F32": np.dtype(np.uint32),
}
"""The integer type of a float's bits names its format, because Numba has no bf16, and no fp16 on a CPU."""

Kind = str | tuple["Kind", ...]
"""A type of arguments: "q" is an integer of 64 bits, "f" a float32, "<u2" a scalar of a NumPy dtype, "<u2:2C" an array
of it, of two dimensions and contiguous ("A" if not), and a tuple stands for a tuple."""
