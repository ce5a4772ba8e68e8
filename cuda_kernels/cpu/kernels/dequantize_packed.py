"""Codes of 2 to 8 bits to float32 weights, by a table of their values and the scale and zero point of each block.

Cost: bits / 8 bytes read and 4 written per weight. Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

from cuda_kernels.cpu.kernels.compiled import compiled


@compiled()
def _code(row, k, bits):  # type: ignore[no-untyped-def]
    """Return code k of a row of bytes."""
    byte, shift = (k * bits) >> 3, (k * bits) & 7
    code = int(row[byte])
    if shift + bits > 8:
        code |= int(row[byte + 1]) << 8
    return (code >> shift) & ((1 << bits) - 1)


@compiled()
def dequantize_packed(codes, bits, values, zeros, scale, first_row, block, weight):  # type: ignore[no-untyped-def]
    block_rows, block_columns = block
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
                    weight[r, k] = (values[_code(codes[r], k, bits)] - z) * s


@compiled()
def dequantize_reordered(codes, bits, values, zeros, scale, first_row, groups, weight):  # type: ignore[no-untyped-def]
    for r in range(weight.shape[0]):
        at = first_row + r
        for k in range(weight.shape[1]):
            g = groups[k]
            weight[r, k] = (values[_code(codes[r], k, bits)] - zeros[at, g]) * scale[at, g]
