"""The CUDA kernels for the backends' tests: their launches executed by the PTX interpreter, and, where there is a GPU,
by that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cuda_kernels import row_quantize
from cuda_kernels.launch import Launch
from cuda_kernels.reference import QuantizedRows
from tests.kernels.outputs import Bits, Outputs
from tests.ptx import Memory, execute

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


class Interpreted:
    """The PTX of the kernels, for one compute capability."""

    def __init__(self, cc: tuple[int, int] = (9, 0), kept_bytes: int = 4096) -> None:
        """Args: kept_bytes: little, so that short rows are long ones, too."""
        self._cc, self._kept_bytes = cc, kept_bytes

    def row_quantize(self, weight: Bits, dtype: str) -> QuantizedRows:
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


class Gpu:
    """The kernels on torch's current CUDA device."""

    def row_quantize(self, weight: Bits, dtype: str) -> QuantizedRows:
        bits = torch.from_numpy(weight.view(np.int16 if weight.itemsize == 2 else np.int32))
        strided = torch.empty_strided(bits.shape, bits.stride(), dtype=bits.dtype, device="cuda").copy_(bits)
        found = row_quantize.row_quantize(strided.view(TORCH_DTYPE[dtype]))
        codes, absmax, signal, noise = (each.cpu().numpy() for each in found)
        return QuantizedRows(codes, absmax, signal.astype(np.float64), noise.astype(np.float64))
