"""The types that the tests' backends take and return, and the memory they write."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.reference import QuantizedActivations, QuantizedRows, QuantizedWeight, n_blocks

Bits = npt.NDArray[Any]
"""uint16 for F16 and BF16, uint32 for F32."""


Rows = QuantizedRows[npt.NDArray[Any]]
Activations = QuantizedActivations[npt.NDArray[Any]]
Weight = QuantizedWeight[npt.NDArray[Any]]


class Outputs:
    """Arrays for a kernel to write, filled with a sentinel and set in margins that `check` finds untouched."""

    MARGIN_BYTES = 256

    def __init__(self) -> None:
        self._margins: list[npt.NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of this shape between two margins: -128 for int8, which no code is, and NaN for floats."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        fill = 0x80 if np.dtype(dtype).kind == "i" else 0xFF
        memory = np.full(size + 2 * self.MARGIN_BYTES, fill, np.uint8)
        self._margins += [memory[: self.MARGIN_BYTES], memory[self.MARGIN_BYTES + size :]]
        return memory[self.MARGIN_BYTES : self.MARGIN_BYTES + size].view(dtype).reshape(shape)

    def activations(
        self, shape: tuple[int, int], n_outliers: int, capacity: int, block_size: int, dtype: npt.DTypeLike
    ) -> Activations:
        """What `activation_quantize` writes for x [M, K], whose bits have this dtype."""
        n_tokens, n_columns = shape
        return QuantizedActivations(
            self.empty(shape, np.int8),
            self.empty((n_tokens, n_blocks(n_columns, block_size)), np.float32),
            self.empty((n_tokens, n_outliers), dtype),
            self.empty((capacity,), np.int32),
            self.empty((1,), np.int32),
            self.empty((n_tokens, capacity), dtype),
            block_size,
        )

    def check(self) -> None:
        for margin in self._margins:
            assert (margin == margin[0]).all(), "written outside an output"
