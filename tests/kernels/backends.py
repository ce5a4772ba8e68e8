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
from cuda_kernels.reference import QuantizedRows
from tests.kernels.cuda_backends import Gpu, Interpreted
from tests.kernels.outputs import Activations, Bits, Outputs, Rows, Weight

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


class Backend(Protocol):
    """What the tests ask of a backend; `reference` says what each operation means."""

    def row_quantize(self, weight: Bits, dtype: str) -> Rows: ...

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        block_size: int = 0,
    ) -> Activations:
        """`outlier_x` and `found_x` as bits."""
        ...

    def int8_matmul(self, x: Activations, weight: Weight, dtype: str) -> Bits:
        """The floats of x and of the weight, and the result, as bits of `dtype`."""
        ...

    def dequantize_epilogue(
        self, products: npt.NDArray[np.int32], x: Activations, weight: Weight, dtype: str
    ) -> Bits: ...


class Reference:
    """The reference through the adapters' door: on x widened, but what it copies from x are the bits of x."""

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        block_size: int = 0,
    ) -> Activations:
        found = reference.activation_quantize(widen(x, dtype), outlier_columns, threshold, capacity, block_size)
        found_x = np.zeros(found.found_x.shape, x.dtype)
        taken = found.found_columns[: int(found.n_found[0])]
        found_x[:, : taken.size] = x[:, taken]
        return found._replace(outlier_x=np.ascontiguousarray(x[:, outlier_columns]), found_x=found_x)


class Cpu:
    """The Numba kernels of `cuda_kernels.cpu`."""

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads

    def row_quantize(self, weight: Bits, dtype: str) -> Rows:
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

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        block_size: int = 0,
    ) -> Activations:
        outputs, bits = Outputs(), cpu.BITS_DTYPE[dtype]
        result = outputs.activations(x.shape, outlier_columns.size, capacity, block_size, bits)
        cpu.activation_quantize(x.view(bits), outlier_columns, threshold, result, n_threads=self._n_threads)
        outputs.check()
        return result._replace(outlier_x=result.outlier_x.view(x.dtype), found_x=result.found_x.view(x.dtype))

    def int8_matmul(self, x: Activations, weight: Weight, dtype: str) -> Bits:
        outputs, bits = Outputs(), cpu.BITS_DTYPE[dtype]
        y = outputs.empty((x.codes.shape[0], weight.absmax.size), weight.outlier_weight.dtype)
        cpu.int8_matmul(*_as_bits(x, weight, dtype), y.view(bits), n_threads=self._n_threads)
        outputs.check()
        return y

    def dequantize_epilogue(self, products: npt.NDArray[np.int32], x: Activations, weight: Weight, dtype: str) -> Bits:
        outputs, bits = Outputs(), cpu.BITS_DTYPE[dtype]
        y = outputs.empty(products.shape, weight.outlier_weight.dtype)
        cpu.dequantize_epilogue(products, *_as_bits(x, weight, dtype), y.view(bits), n_threads=self._n_threads)
        outputs.check()
        return y


def _as_bits(x: Activations, weight: Weight, dtype: str) -> tuple[Activations, Weight]:
    """Their floats in the dtype by which the CPU kernels know the format."""
    bits, bias = cpu.BITS_DTYPE[dtype], weight.bias
    return (
        x._replace(outlier_x=x.outlier_x.view(bits), found_x=x.found_x.view(bits)),
        weight._replace(
            outlier_weight=weight.outlier_weight.view(bits), bias=bias if bias is None else bias.view(bits)
        ),
    )


BACKENDS: dict[str, tuple[object, list[pytest.MarkDecorator]]] = {
    "cpu": (Cpu(n_threads=1), []),
    "ptx": (Interpreted(), []),
    "gpu": (Gpu(), [pytest.mark.gpu]),
}
"""id -> the adapter and the marks its tests carry."""


def backends(operation: str) -> list[Any]:
    """For `pytest.mark.parametrize("backend", ...)`: the backends that have this operation."""
    return [
        pytest.param(adapter, id=name, marks=marks)
        for name, (adapter, marks) in BACKENDS.items()
        if hasattr(adapter, operation)
    ]
