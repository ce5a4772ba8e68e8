"""FP8 codes to float32 weights, by a table of 256 values and the scale of each block.

Cost: 1 byte read and 4 written per weight. Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cuda_kernels.cpu.compiled import compiled


@compiled()
def _dequantize_fp8(codes, values, scale, first_row, block_rows, block_columns, weight):  # type: ignore[no-untyped-def]
    for r in range(codes.shape[0]):
        scales = scale[(first_row + r) // block_rows]
        for b in range(scales.size):
            s = scales[b]
            for k in range(b * block_columns, min((b + 1) * block_columns, codes.shape[1])):
                weight[r, k] = values[codes[r, k]] * s


def dequantize_fp8(
    codes: npt.NDArray[np.uint8],
    values: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    first_row: int,
    block_rows: int,
    block_columns: int,
    weight: npt.NDArray[np.float32],
) -> None:
    """Write the values of FP8 codes to `weight`, float32 [rows, cols]. Releases the GIL.

    Bit-equal to `reference.dequantize_fp8`.
    """
    _dequantize_fp8(codes, values, scale, first_row, block_rows, block_columns, weight)
