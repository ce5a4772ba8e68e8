"""The CUDA kernels through the PTX interpreter: the launches that a GPU would get, executed without one.

An adapter for `backends`. Inputs are placed read-only and rows of x between values that must not be read; a step
outside an array, a race in shared memory or a read of what was never written is an error (`tests.ptx.memory`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import activation_quantize, dequantize_epilogue, int8_gemv, int8_skinny
from cuda_kernels.int8_operands import Operands
from cuda_kernels.launch import Launch
from cuda_kernels.reference import QuantizedActivations
from tests.kernels.backends import Bits, Outputs
from tests.ptx import Memory, execute

Array = npt.NDArray[Any]
Capability = tuple[int, int]


def run(launches: Iterable[Launch], memory: Memory, cc: Capability = (9, 0)) -> None:
    """What `launch.run` does, on arrays that were placed in `memory`."""
    for kernel, grid, shared_bytes, args in launches:
        execute(kernel.ptx(cc), grid, kernel.threads, args, memory, shared_bytes)


def place(memory: Memory, array: Array) -> int:
    """The address of a read-only copy."""
    held = np.array(array, order="C")
    held.flags.writeable = False
    return memory.place(held)


def place_rows(memory: Memory, rows: Array, shift: int) -> tuple[int, int]:
    """The address of a read-only copy of rows as far apart as they are, `shift` elements after an aligned address, and
    that distance. What lies between them is NaN."""
    stride = rows.strides[0] // rows.itemsize
    held = np.full(shift + (len(rows) - 1) * stride + rows.shape[1], np.iinfo(rows.dtype).max, rows.dtype)
    for i, row in enumerate(rows):
        held[shift + i * stride : shift + i * stride + row.size] = row
    return place(memory, held) + shift * rows.itemsize, stride


def place_operands(
    memory: Memory,
    x: QuantizedActivations,
    dtype: str,
    weight_codes: npt.NDArray[np.int8],
    weight_absmax: npt.NDArray[np.float32],
    outlier_weight: Bits,
    bias: Bits | None,
    y: Bits,
    shift: int = 0,
) -> Operands:
    """Place a product's arrays, the two of codes `shift` bytes after an aligned address."""
    pointers = [place_rows(memory, x.codes, shift)[0]]
    pointers += [place(memory, part) for part in (x.absmax, x.outlier_x, x.found_columns, x.n_found, x.found_x)]
    pointers += [place_rows(memory, weight_codes, shift)[0]]
    pointers += [place(memory, part) for part in (weight_absmax, outlier_weight)]
    pointers += [0 if bias is None else place(memory, bias), memory.place(y)]
    sizes = (*y.shape, x.codes.shape[1], outlier_weight.shape[1], x.found_columns.size)
    return Operands(dtype, *pointers, *sizes)


class Interpreted:
    """Every operation by the plan that a GPU of one compute capability would get.

    Args:
        matmul: "gemv", "skinny" or "epilogue", which is given the integer products, as after `torch._int_mm`.
        shift: by how many elements the first address of x, and of the codes to multiply, misses an aligned one.
    """

    def __init__(self, matmul: str = "gemv", cc: Capability = (9, 0), shift: int = 0) -> None:
        self.matmul, self.cc, self.shift = matmul, cc, shift

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        cut: activation_quantize.Plan | None = None,
    ) -> QuantizedActivations:
        (n_tokens, n_columns), n, memory, outputs = x.shape, outlier_columns.size, Memory(), Outputs()
        cut = cut or activation_quantize.plan(n_tokens, n_columns)
        result = QuantizedActivations(
            outputs.empty(x.shape, np.int8),
            outputs.empty((n_tokens,), np.float32),
            outputs.empty((n_tokens, n), x.dtype),
            outputs.empty((capacity,), np.int32),
            outputs.empty((1,), np.int32),
            outputs.empty((n_tokens, capacity), x.dtype),
        )
        address, row_stride = place_rows(memory, x, self.shift)
        marks = np.full(activation_quantize.mark_bytes(n_tokens, n_columns, capacity, cut), 0xFF, np.uint8)
        inputs = (address, place(memory, outlier_columns), memory.place(marks))
        sizes = (threshold, n_tokens, n_columns, row_stride, n, capacity)
        placed = activation_quantize.Operands(dtype, *inputs, *(memory.place(part) for part in result), *sizes)
        run(activation_quantize.launches(placed, cut), memory, self.cc)
        outputs.check()
        return result

    def int8_matmul(
        self,
        x: QuantizedActivations,
        dtype: str,
        weight_codes: npt.NDArray[np.int8],
        weight_absmax: npt.NDArray[np.float32],
        outlier_weight: Bits,
        bias: Bits | None,
        cut: Any = None,
    ) -> Bits:
        memory, outputs = Memory(), Outputs()
        y = outputs.empty((len(x.codes), len(weight_codes)), outlier_weight.dtype)
        placed = place_operands(memory, x, dtype, weight_codes, weight_absmax, outlier_weight, bias, y, self.shift)
        if self.matmul == "epilogue":
            products = x.codes.astype(np.int32) @ weight_codes.astype(np.int32).T
            launches = dequantize_epilogue.launches(placed, place(memory, products), *(cut or ()))
        else:
            launches = (int8_gemv if self.matmul == "gemv" else int8_skinny).launches(placed, cut)
        run(launches, memory, self.cc)
        outputs.check()
        return y
