"""Codes of 2 to 8 bits to float32 weights, by a table of their values and the scale and zero point of each block.

Cost: bits / 8 bytes read and 4 written per weight. Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

from cuda_kernels.cpu.kernels.compiled import compiled


@compiled()
def dequantize_packed(codes, bits, values, zeros, scale, first_row, block, weight):  # type: ignore[no-untyped-def]
    block_rows, block_columns = block
    mask = (1 << bits) - 1
    n_bytes = codes.shape[1]
    for r in range(weight.shape[0]):
        at = (first_row + r) // block_rows
        for b in range(scale.shape[1]):
            s = scale[at, b]
            z = zeros[at, b]
            begin = b * block_columns
            end = min(begin + block_columns, weight.shape[1])
            if bits == 4:
                for k in range(begin, end):
                    code = (codes[r, k >> 1] >> (4 * (k & 1))) & 15
                    weight[r, k] = (values[code] - z) * s
            elif bits == 8:
                for k in range(begin, end):
                    weight[r, k] = (values[codes[r, k]] - z) * s
            else:
                for k in range(begin, end):
                    bit = k * bits
                    byte = bit >> 3
                    code = int(codes[r, byte])
                    if byte + 1 < n_bytes:
                        code |= int(codes[r, byte + 1]) << 8
                    weight[r, k] = (values[(code >> (bit & 7)) & mask] - z) * s


@compiled()
def dequantize_reordered(codes, bits, values, zeros, scale, first_row, groups, weight):  # type: ignore[no-untyped-def]
    mask = (1 << bits) - 1
    n_bytes = codes.shape[1]
    for r in range(weight.shape[0]):
        at = first_row + r
        for k in range(weight.shape[1]):
            bit = k * bits
            byte = bit >> 3
            code = int(codes[r, byte])
            if (bit & 7) + bits > 8 and byte + 1 < n_bytes:
                code |= int(codes[r, byte + 1]) << 8
            g = groups[k]
            weight[r, k] = (values[(code >> (bit & 7)) & mask] - zeros[at, g]) * scale[at, g]
