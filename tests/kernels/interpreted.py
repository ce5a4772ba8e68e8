"""The CUDA kernels through the PTX interpreter: the launches that a GPU would get, executed without one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from cuda_kernels import dequantize_epilogue, int8_gemv, int8_skinny
from cuda_kernels.launch import Launch
from cuda_kernels.reference import QuantizedActivations
from tests.kernels.backends import Bits, Outputs
from tests.ptx import Memory, execute

CC = (9, 0)


def run(launches: Iterable[Launch], memory: Memory, cc: tuple[int, int] = CC) -> None:
    """What `launch.run` does, on arrays that were placed in `memory`."""
    for kernel, grid, shared_bytes, args in launches:
        execute(kernel.ptx(cc), grid, kernel.threads, args, memory, shared_bytes)


def operands(
    memory: Memory,
    x: QuantizedActivations,
    dtype: str,
    weight_codes: npt.NDArray[np.int8],
    weight_absmax: npt.NDArray[np.float32],
    outlier_weight: Bits,
    bias: Bits | None,
    y: Bits,
) -> dequantize_epilogue.Operands:
    """Place a product's arrays; inputs read-only."""

    def place(array: npt.NDArray[np.generic]) -> int:
        held = np.ascontiguousarray(array)
        held = held.copy() if held.flags.writeable else held
        held.flags.writeable = False
        return memory.place(held)

    pointers = [place(part) for part in (x.codes, x.absmax, x.outlier_x, x.found_columns, x.n_found, x.found_x)]
    pointers += [place(part) for part in (weight_codes, weight_absmax, outlier_weight)]
    pointers += [0 if bias is None else place(bias), memory.place(y)]
    sizes = (*y.shape, x.codes.shape[1], outlier_weight.shape[1], x.found_columns.size)
    return dequantize_epilogue.Operands(dtype, *pointers, *sizes)
