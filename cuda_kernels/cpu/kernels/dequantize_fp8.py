"""FP8 codes to float32 weights, by a table of 256 values and the scale of each block.

Cost: 1 byte read and 4 written per weight. Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

from cuda_kernels.cpu.kernels.compiled import compiled


@compiled()
def dequantize_fp8(codes, values, scale, first_row, block_rows, block_columns, weight):  # type: ignore[no-untyped-def]
    for r in range(codes.shape[0]):
        scales = scale[(first_row + r) // block_rows]
        for b in range(scales.size):
            s = scales[b]
            for k in range(b * block_columns, min((b + 1) * block_columns, codes.shape[1])):
                weight[r, k] = values[codes[r, k]] * s
