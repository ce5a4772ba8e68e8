"""The CUDA kernels for the backends' tests: their launches executed by the PTX interpreter, and, where there is a GPU,
by that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cuda_kernels.cuda import (
    activation_quantize,
    dequantize_epilogue,
    int8_blocks,
    int8_gemv,
    int8_matmul,
    int8_skinny,
    row_quantize,
)
from cuda_kernels.cuda.int8_matmul import Engine
from cuda_kernels.cuda.int8_operands import Operands
from cuda_kernels.cuda.launch import Launch
from cuda_kernels.reference import QuantizedActivations, QuantizedRows, QuantizedWeight
from tests.kernels.outputs import Activations, Bits, Outputs, Rows, Weight
from tests.tools.ptx import Memory, execute

# Few plans on many shapes, for every plan is compiled: a second or two each.
QUANTIZE = activation_quantize.Plan(threads=64, tokens=2, own_tokens=8, mark_tokens=16)
GEMV = int8_gemv.plan(4, 2304, 9216)
SKINNY = int8_skinny.plan(16, 2304, 9216)
BLOCKS = int8_blocks.Plan(token_tiles=2, row_tiles=1, split=2)

TORCH_DTYPE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def interpret(launches: list[Launch], memory: Memory, cc: tuple[int, int] = (9, 0)) -> None:
    """Execute what an operation planned."""
    for launch in launches:
        block = (launch.kernel.threads, 1, 1)
        execute(launch.kernel.ptx(cc), launch.grid, block, launch.args, memory, shared_bytes=launch.shared_bytes)


def place_rows(memory: Memory, rows: npt.NDArray[Any]) -> int:
    """The address of rows that may lie apart; nothing is there before the first and after the last."""
    if rows.size == 0 or rows.flags.c_contiguous:
        return memory.place(np.ascontiguousarray(rows))
    n = ((rows.shape[0] - 1) * rows.strides[0] + rows.shape[1] * rows.itemsize) // rows.itemsize
    return memory.place(np.lib.stride_tricks.as_strided(rows[0], (n,), (rows.itemsize,)).copy())


def place(memory: Memory, array: npt.NDArray[Any], shift: int = 0) -> int:
    """The address of a read-only copy, `shift` elements after an aligned one."""
    held = np.concatenate([np.zeros(shift, array.dtype), array.reshape(-1)])
    held.flags.writeable = False
    return memory.place(held) + shift * array.itemsize


def place_product(
    memory: Memory,
    x: Activations,
    weight: Weight,
    dtype: str,
    y: Bits,
    shift: int = 0,
) -> Operands:
    """A product's operands, the two of codes `shift` bytes after an aligned address."""
    floats_of_x = (place(memory, each) for each in x[1:6])
    placed_x: QuantizedActivations[int] = QuantizedActivations._make(
        (place(memory, x.codes, shift), *floats_of_x, x.block_size)
    )
    floats = [place(memory, each) for each in (weight.absmax, weight.outlier_weight)]
    bias = 0 if weight.bias is None else place(memory, weight.bias)
    placed_weight = QuantizedWeight(place(memory, weight.codes, shift), *floats, bias)
    sizes = (*y.shape, weight.codes.shape[1], weight.outlier_weight.shape[1], x.found_columns.size)
    return Operands(dtype, placed_x, placed_weight, memory.place(y), *sizes)


class Interpreted:
    """The PTX of the kernels, for one compute capability."""

    def __init__(self, cc: tuple[int, int] = (9, 0), kept_bytes: int = 4096, shift: int = 0) -> None:
        """
        Args:
            kept_bytes: little, so that short rows are long ones, too.
            shift: by how many elements x, and codes to multiply, miss an aligned address.
        """
        self._cc, self._kept_bytes, self._shift = cc, kept_bytes, shift

    def row_quantize(self, weight: Bits, dtype: str) -> Rows:
        outputs, memory, n_rows = Outputs(), Memory(), weight.shape[0]
        codes = outputs.empty(weight.shape, np.int8)
        sums = [outputs.empty((n_rows,), np.float32) for _ in range(3)]
        planned = row_quantize.launches(
            place_rows(memory, weight),
            dtype,
            weight.shape,
            weight.strides[0] // weight.itemsize,
            memory.place(codes),
            *(memory.place(each) for each in sums),
            self._kept_bytes,
        )
        interpret(planned, memory, self._cc)
        outputs.check()
        absmax, signal, noise = sums
        return QuantizedRows(codes, absmax, signal.astype(np.float64), noise.astype(np.float64))

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        block_size: int = 0,
        cut: activation_quantize.Plan = QUANTIZE,
    ) -> Activations:
        (n_tokens, n_columns), n, memory, outputs = x.shape, outlier_columns.size, Memory(), Outputs()
        result = outputs.activations(x.shape, n, capacity, block_size, x.dtype)
        marks = outputs.empty((activation_quantize.mark_bytes(n_tokens, n_columns, capacity, cut),), np.uint8)
        row_stride = x.strides[0] // x.itemsize
        apart = np.full(self._shift + max(n_tokens - 1, 0) * row_stride + n_columns, np.iinfo(x.dtype).max, x.dtype)
        for t in range(n_tokens):
            apart[self._shift + t * row_stride :][:n_columns] = x[t]
        inputs = (place(memory, apart) + self._shift * x.itemsize, place(memory, outlier_columns), memory.place(marks))
        sizes = (threshold, n_tokens, n_columns, row_stride, n, capacity)
        placed = (memory.place(each) for each in result[:6])
        written: QuantizedActivations[int] = QuantizedActivations._make((*placed, block_size))
        operands = activation_quantize.Operands(dtype, *inputs, written, *sizes)
        interpret(activation_quantize.launches(operands, cut), memory, self._cc)
        outputs.check()
        return result

    def int8_matmul(
        self,
        x: Activations,
        weight: Weight,
        dtype: str,
        engine: Engine | None = None,
        cut: Any = None,
    ) -> Bits:
        """By the engine that a GPU would choose, unless one is named; the library's products are NumPy's."""
        memory, outputs = Memory(), Outputs()
        y = outputs.empty((len(x.codes), len(weight.codes)), weight.outlier_weight.dtype)
        placed = place_product(memory, x, weight, dtype, y, self._shift)
        engine = engine or int8_matmul.choose(placed, self._cc)
        if engine is Engine.LIBRARY:
            products = x.codes.astype(np.float64) @ weight.codes.T.astype(np.float64)
            return self.dequantize_epilogue(products.astype(np.int32), x, weight, dtype)
        if y.size and engine is Engine.BLOCKS:
            interpret(int8_blocks.launches(placed, self._cc, cut or BLOCKS), memory, self._cc)
        elif y.size and engine is Engine.GEMV:
            interpret(int8_gemv.launches(placed, cut or GEMV), memory, self._cc)
        elif y.size:
            interpret(int8_skinny.launches(placed, cut or SKINNY), memory, self._cc)
        outputs.check()
        return y

    def dequantize_epilogue(self, products: npt.NDArray[np.int32], x: Activations, weight: Weight, dtype: str) -> Bits:
        memory, outputs = Memory(), Outputs()
        y = outputs.empty(products.shape, weight.outlier_weight.dtype)
        placed = place_product(memory, x._replace(codes=np.empty(0, np.int8)), weight, dtype, y)
        if y.size:
            interpret(dequantize_epilogue.launches(placed, place(memory, products)), memory, self._cc)
        outputs.check()
        return y


class Gpu:
    """The kernels on torch's current CUDA device."""

    def row_quantize(self, weight: Bits, dtype: str) -> Rows:
        bits = torch.from_numpy(weight.view(np.int16 if weight.itemsize == 2 else np.int32))
        strided = torch.empty_strided(bits.shape, bits.stride(), dtype=bits.dtype, device="cuda").copy_(bits)
        found = row_quantize.row_quantize(strided.view(TORCH_DTYPE[dtype]))
        codes, absmax, signal, noise = (each.cpu().numpy() for each in found)
        return QuantizedRows(codes, absmax, signal.astype(np.float64), noise.astype(np.float64))

    def activation_quantize(
        self,
        x: Bits,
        dtype: str,
        outlier_columns: npt.NDArray[np.int32],
        threshold: float,
        capacity: int,
        block_size: int = 0,
    ) -> Activations:
        bits = torch.from_numpy(x.view(np.int16 if x.itemsize == 2 else np.int32))
        strided = torch.empty_strided(bits.shape, bits.stride(), dtype=bits.dtype, device="cuda").copy_(bits)
        columns = torch.from_numpy(outlier_columns).cuda()
        rule = (columns, threshold, capacity, block_size)
        found = activation_quantize.activation_quantize(strided.view(TORCH_DTYPE[dtype]), *rule)
        plain = (each.cpu().numpy() for each in found[:6])
        return QuantizedActivations(*plain)._replace(
            outlier_x=from_device(found.outlier_x), found_x=from_device(found.found_x), block_size=block_size
        )

    def int8_matmul(self, x: Activations, weight: Weight, dtype: str) -> Bits:
        return from_device(int8_matmul.int8_matmul(*product_on_device(x, weight, dtype)))

    def dequantize_epilogue(self, products: npt.NDArray[np.int32], x: Activations, weight: Weight, dtype: str) -> Bits:
        operands = product_on_device(x, weight, dtype)
        return from_device(dequantize_epilogue.dequantize_epilogue(torch.from_numpy(products).cuda(), *operands))


def on_device(bits: Bits, dtype: str) -> torch.Tensor:
    """Floats on torch's current CUDA device."""
    signed = np.ascontiguousarray(bits).view(np.int16 if bits.itemsize == 2 else np.int32)
    return torch.from_numpy(signed).cuda().view(TORCH_DTYPE[dtype])


def from_device(values: torch.Tensor) -> Bits:
    """Their bits."""
    signed, unsigned = (torch.int16, np.uint16) if values.element_size() == 2 else (torch.int32, np.uint32)
    return values.view(signed).cpu().numpy().view(unsigned)


def product_on_device(
    x: Activations, weight: Weight, dtype: str
) -> tuple[QuantizedActivations[torch.Tensor], QuantizedWeight[torch.Tensor]]:
    """The arguments of `int8_matmul` on torch's current CUDA device."""

    def plain(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).cuda()

    bias = None if weight.bias is None else on_device(weight.bias, dtype)
    side_weight = on_device(weight.outlier_weight, dtype)
    return (
        QuantizedActivations(
            plain(x.codes),
            plain(x.absmax),
            on_device(x.outlier_x, dtype),
            plain(x.found_columns),
            plain(x.n_found),
            on_device(x.found_x, dtype),
            x.block_size,
        ),
        QuantizedWeight(plain(weight.codes), plain(weight.absmax), side_weight, bias),
    )
