"""A Linear layer in one call: tokens are quantized, multiplied and finished, all in memory of the kernel's own.

It has the bits of `activation_quantize` and then `int8_matmul`. It gets addresses: an array of each operand would cost
a token of a small layer as much as the product.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.activation_quantize import find_columns, parts_worth, quantize_token
from cuda_kernels.cpu.kernels.bits import widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.int8_matmul import multiply, prepare_token
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import N_CODES, N_TILE_TOKENS, NO_MEMORY
from cuda_kernels.cpu.kernels.team import part_of, run_parts


@compiled()
def _prepare_tokens(x, row_stride, keep, columns, tokens, absmax, side_x, part, n_parts):  # type: ignore[no-untyped-def]
    codes, tails, block_size, offsets, scales = tokens
    stored, found = columns
    begin, end = part_of(codes.shape[0], 1, part, n_parts)
    for t in range(begin, end):
        row = x[t * row_stride : t * row_stride + keep.size]
        quantize_token(row, keep, codes[t], absmax[t], block_size)
        prepare_token(t, codes, absmax[t], tails, block_size, offsets, scales)
        for j in range(stored.size):
            side_x[t, j] = widen(row[stored[j]])
        for j in range(found.size):
            side_x[t, stored.size + j] = widen(row[found[j]])


@compiled()
def int8_linear(sizes, x, row_stride, stored, threshold, capacity, block_size, weight, y, y_stride, team, like):  # type: ignore[no-untyped-def]
    """Write `y`, [M, N] with rows `y_stride` elements apart; return 0, or what went wrong.

    Args:
        sizes: M, N and K.
        x, row_stride: address of the bits of x, and the elements from one row to the next.
        stored: address and number of the stored outlier columns, int32.
        capacity: how many further columns may be found.
        block_size: K for one block.
        weight: addresses of the codes, of absmax, of the outlier columns' weights, and of the bias or 0.
        y: address.
        like: any value of the type of the bits.
    """
    n_tokens, n_rows, n_columns = sizes
    columns_at = allocate(4 * capacity + 4 * n_columns + 128)
    if columns_at == 0:
        return NO_MEMORY
    at = aligned(columns_at)
    found = view(at, (capacity,), np.int32(0))
    keep = view(aligned(at + 4 * capacity), (n_columns,), like)
    bits = view(x, ((n_tokens - 1) * row_stride + n_columns,), like)
    stored_columns = view(stored[0], (stored[1],), np.int32(0))
    status = find_columns(bits, row_stride, n_tokens, stored_columns, threshold, keep, found, team)
    if status >= 0:
        found = found[: min(status, capacity)]
        weight_arrays = (
            view(weight[0], (n_rows, n_columns), np.int8(0)),
            view(weight[1], (n_rows,), np.float32(0)),
            view(weight[2], (n_rows, stored[1]), like),
        )
        bias = view(weight[3], (n_rows if weight[3] else 0,), like)
        outputs = view(y, ((n_tokens - 1) * y_stride + n_rows,), like)
        columns = (stored_columns, found)
        status = _apply(
            bits, row_stride, n_tokens, keep, columns, block_size, weight_arrays, bias, outputs, y_stride, team
        )
    release(columns_at)
    return status


@compiled()
def _apply(x, row_stride, n_tokens, keep, columns, block_size, weight, bias, y, y_stride, team):  # type: ignore[no-untyped-def]
    n_columns, n_side = keep.size, columns[0].size + columns[1].size
    n_blocks = max(1, -(-n_columns // max(block_size, 1)))
    n_padded = n_tokens + N_TILE_TOKENS
    sizes = (n_tokens * n_columns, n_tokens * N_CODES, 4 * n_blocks * n_padded, 4 * n_blocks * n_padded)
    memory = allocate(sum(sizes) + 4 * n_tokens * (n_side + n_blocks) + 64 * 6)
    if memory == 0:
        return NO_MEMORY
    at = aligned(memory)
    codes = view(at, (n_tokens, n_columns), np.int8(0))
    at = aligned(at + codes.nbytes)
    tails = view(at, (n_tokens, N_CODES), np.int8(0))
    at = aligned(at + tails.nbytes)
    offsets = view(at, (n_blocks, n_padded), np.int32(0))
    at = aligned(at + offsets.nbytes)
    scales = view(at, (n_blocks, n_padded), np.float32(0))
    at = aligned(at + scales.nbytes)
    absmax = view(at, (n_tokens, n_blocks), np.float32(0))
    side_x = view(aligned(at + absmax.nbytes), (n_tokens, n_side), np.float32(0))
    tails[:] = 0
    offsets[:] = 0
    scales[:] = 0
    tokens = (codes, tails, block_size, offsets, scales)
    args = (x, row_stride, keep, columns, tokens, absmax, side_x)
    run_parts(_prepare_tokens, args, parts_worth(n_tokens * n_columns, team), team)
    status = multiply(tokens, side_x, columns[1], weight, bias, y, y_stride, team)
    release(memory)
    return status
