"""One adapter per backend, so that every test of an operation runs against all of them.

An adapter has a method per operation it offers, of the operation's name in `cuda_kernels.reference`. Floats go in and
come out as their bits, `uint16` for F16 and BF16, `uint32` for F32, beside the dtype's name: NumPy has no bf16.
`weight` and `x` may be views whose rows lie apart (`strides[0]` larger than a row, last stride one element), and a
backend must read them where they are. An adapter fills every output with what the operation never writes, and leaves
a margin beside it that must come back untouched; see `Outputs`.

A new backend: a class with the methods it has so far, and its line in `BACKENDS`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest

from cuda_kernels import cpu, reference
from cuda_kernels.reference import QuantizedActivations, QuantizedRows

Bits = npt.NDArray[Any]
"""uint16 for F16 and BF16, uint32 for F32."""

DTYPES = ["F16", "BF16", "F32"]


def narrow(values: npt.ArrayLike, dtype: str) -> Bits:
    """The bits of the nearest values of `dtype`, ties to even; too large becomes infinite, NaN stays NaN."""
    with np.errstate(over="ignore"):
        wide = np.asarray(values).astype(np.float32)
        if dtype == "F16":
            # From the values as given: by way of float32 a float64 would be rounded twice.
            return np.asarray(values).astype(np.float16).view(np.uint16)
    bits = wide.view(np.uint32)
    if dtype == "F32":
        return bits
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def widen(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """The values these bits stand for, exactly."""
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32)


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

    def check(self) -> None:
        for margin in self._margins:
            assert (margin == margin[0]).all(), "written outside an output"


class Backend(Protocol):
    """What the tests ask of a backend; `reference` says what each operation means."""

    def row_quantize(self, weight: Bits, dtype: str) -> QuantizedRows: ...

    def activation_quantize(
        self, x: Bits, dtype: str, outlier_columns: npt.NDArray[np.int32], threshold: float, capacity: int
    ) -> QuantizedActivations:
        """`outlier_x` and `found_x` as bits."""
        ...

    def int8_matmul(
        self,
        x: QuantizedActivations,
        dtype: str,
        weight_codes: npt.NDArray[np.int8],
        weight_absmax: npt.NDArray[np.float32],
        outlier_weight: Bits,
        bias: Bits | None,
    ) -> Bits:
        """`x.outlier_x`, `x.found_x`, `outlier_weight`, `bias` and the result as bits of `dtype`."""
        ...

    def dequantize_epilogue(
        self,
        products: npt.NDArray[np.int32],
        x: QuantizedActivations,
        dtype: str,
        weight_codes: npt.NDArray[np.int8],
        weight_absmax: npt.NDArray[np.float32],
        outlier_weight: Bits,
        bias: Bits | None,
    ) -> Bits: ...


class Reference:
    """The reference through the adapters' door: its float64 results rounded once to the dtype of x."""

    def activation_quantize(
        self, x: Bits, dtype: str, outlier_columns: npt.NDArray[np.int32], threshold: float, capacity: int
    ) -> QuantizedActivations:
        found = reference.activation_quantize(widen(x, dtype), outlier_columns, threshold, capacity)
        return found._replace(outlier_x=narrow(found.outlier_x, dtype), found_x=narrow(found.found_x, dtype))


class Cpu:
    """The Numba kernels of `cuda_kernels.cpu`."""

    def row_quantize(self, weight: Bits, dtype: str) -> QuantizedRows:
        outputs, rows = Outputs(), weight.shape[0]
        result = QuantizedRows(
            outputs.empty(weight.shape, np.int8),
            outputs.empty((rows,), np.float32),
            outputs.empty((rows,), np.float64),
            outputs.empty((rows,), np.float64),
        )
        cpu.row_quantize(weight.view(cpu.BITS_DTYPE[dtype]), *result)
        outputs.check()
        return result


BACKENDS: dict[str, tuple[object, list[pytest.MarkDecorator]]] = {
    "cpu": (Cpu(), []),
}
"""id -> the adapter and the marks its tests carry."""


def backends(operation: str) -> list[Any]:
    """For `pytest.mark.parametrize("backend", ...)`: the backends that have this operation."""
    return [
        pytest.param(adapter, id=name, marks=marks)
        for name, (adapter, marks) in BACKENDS.items()
        if hasattr(adapter, operation)
    ]
