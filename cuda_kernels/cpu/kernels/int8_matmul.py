"""The int8 product with its epilogue fused, so that sums never leave the cache; see `reference.int8_matmul`.

For each 32 weight rows, the kernel widens the side weights once. Then it computes the products of 128 to 512 tokens,
exact in int32 within a block of columns, adds up the blocks in float32, in ascending order, and finishes the outputs.
Weights are read from memory once for these tokens, whose codes stay in the core's cache. The products:

1. By rows, for one scale a token or few tokens, over all columns. The rows are read one after the other for one token
   with one scale. Four tokens take four rows at once, where 8 loads serve 16 vector products. The lanes of a sum are
   added up once a block.
2. By tiles, for more tokens with blocks: the codes of a block are packed once for all tokens; see `int8_tiles`.
3. By pairs, where the processor has no byte products; see `int8_pairs`.

All compute the same integers, so a token's bits depend neither on its batch nor on the processor.

Cost: N * K bytes of weight codes read, the floor for few tokens; for many, M * N * K / 64 vector products. On one core
of an AMD EPYC with VPDPBUSD, blocks of 128 columns take 1.1 times the time of one scale for one token, 1.2 to 1.6 times
for 4 to 16 tokens, and 1.0 to 1.2 times for 64 or more.
Threads share the weight rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.dequantize_epilogue import N_ROWS, finish_tokens, load_rows, row_bytes, widen_side_x
from cuda_kernels.cpu.kernels.int8_pairs import N_PAIR_ROWS, N_PAIR_TOKENS, add_tile, add_token_and_row
from cuda_kernels.cpu.kernels.int8_tiles import add_scaled_tile, add_to_tile, pack_codes, start_tile
from cuda_kernels.cpu.kernels.int8_vectors import (
    HAS_BYTE_PRODUCTS,
    OFFSET,
    SUM_BYTES,
    add_products,
    add_scaled_totals,
    load_sums,
    row_products,
    store_row_sums,
    store_sums,
    zero_floats,
    zero_sums,
)
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import N_CODES, N_TILE_TOKENS, NO_MEMORY
from cuda_kernels.cpu.kernels.team import part_of, run_parts
from cuda_kernels.reference import N_STEPS

_ROUND_BYTES, _MIN_ROUND, _MAX_ROUND = 1 << 19, 128, 512
"""Codes of the tokens of a round, which stay in the core's cache, and the bounds of their number."""

_N_BY_ROWS = 4
"""Tokens of a round with blocks, at most, that go by rows."""

_N_BY_TILES = 3
"""Tokens of a round, at least, that go by tiles of pairs."""

_MIN_WORK = 1 << 21
"""Work that pays for a thread, about 10 us: 8 units for each weight read, and 1 for each product."""


class _Tokens(NamedTuple):
    """Where the activations are: addresses in memory, and sizes.

    Attributes:
        codes, n_columns: int8 [M, n_columns].
        tails: int8 [M, 64]: the last codes of each token, which fill no vector, then 0.
        block_size, n_blocks: columns of a block, and blocks.
        offsets, scales: int32 and float32 [n_blocks, n_padded]: of a block, what the offset of the weight codes adds to
            its products, and its scale.
    """

    codes: int
    n_columns: int
    tails: int
    block_size: int
    n_blocks: int
    offsets: int
    scales: int
    n_padded: int


class _WideTokens(NamedTuple):
    """The codes of the tokens as int16, where there are no byte products.

    Attributes:
        codes: address of the first token's, 0 in columns past the last.
        stride: bytes from one token to the next: a multiple of 64 columns.
    """

    codes: int
    stride: int


class _Rows(NamedTuple):
    """Where up to 32 weight rows are.

    Attributes:
        codes, stride, n: address of the first row, bytes from one to the next, and rows.
        tails: address of int8 [32, 64], as for the activations.
    """

    codes: int
    stride: int
    n: int
    tails: int


@compiled()
def _locate(codes, tails, block_size, offsets, scales):  # type: ignore[no-untyped-def]
    (n_columns, (n_blocks, n_padded)), tails_at = (codes.shape[1], offsets.shape), tails.ctypes.data
    offsets_at, scales_at = offsets.ctypes.data, scales.ctypes.data
    return _Tokens(codes.ctypes.data, n_columns, tails_at, block_size, n_blocks, offsets_at, scales_at, n_padded)


_TAIL_BYTES = N_ROWS * N_CODES
_SPARE_BYTES = N_ROWS * 4


@compiled()
def _tokens_of_round(n_tokens, n_columns):  # type: ignore[no-untyped-def]
    n = _ROUND_BYTES // max(n_columns, 1) // _MIN_ROUND * _MIN_ROUND
    return min(max(min(n, _MAX_ROUND), _MIN_ROUND), n_tokens)


@compiled()
def _multiply(tokens, wide, side_x, found_columns, weight, bias, y, y_stride, memory, part_bytes, part, n_parts):  # type: ignore[no-untyped-def]
    x = _locate(*tokens)
    weight_codes, weight_absmax, outlier_weight = weight
    begin, end = part_of(weight_absmax.size, N_ROWS, part, n_parts)
    at, n_round = memory + part * part_bytes, _tokens_of_round(side_x.shape[0], x.n_columns)
    sums = view(at, (n_round + N_TILE_TOKENS, N_ROWS), np.float32(0))
    at += sums.nbytes
    tails = view(at, (N_ROWS, N_CODES), np.int8(0))
    spare = view(at + _TAIL_BYTES, (N_ROWS,), y.dtype.type(0))
    rows_at = at + _TAIL_BYTES + _SPARE_BYTES
    rows, packed = view(rows_at, (2 + side_x.shape[1], N_ROWS), np.float32(0)), rows_at + row_bytes(side_x.shape[1])
    rows[:] = 0
    tails[:] = 0
    for first in range(0, side_x.shape[0], n_round):
        last = min(first + n_round, side_x.shape[0])
        for n in range(begin, end, N_ROWS):
            stop = min(n + N_ROWS, end)
            _copy_tails(weight_codes[n:stop], tails)
            w = weight_codes.ctypes.data + n * weight_codes.shape[1]
            tile = _Rows(w, weight_codes.shape[1], stop - n, tails.ctypes.data)
            if not HAS_BYTE_PRODUCTS:
                sums[: last - first + N_TILE_TOKENS] = 0
                _sum_by_pairs(x, wide, first, last, tile, sums.ctypes.data)
            elif x.n_blocks == 1 or last - first <= _N_BY_ROWS:
                _sum_by_rows(x, first, last, tile, packed, sums.ctypes.data)
            else:
                sums[: last - first + N_TILE_TOKENS] = 0
                _sum_by_tiles(x, first, last, tile, packed, sums.ctypes.data)
            # After the products, when the cache holds the codes of the found columns.
            load_rows(n, found_columns, weight_codes, weight_absmax, outlier_weight, bias, rows)
            outputs = y[first * y_stride + n :]
            finish_tokens(sums, last - first, side_x[first:last], rows, spare, outputs, y_stride, stop - n)


@compiled()
def multiply(tokens, side_x, found_columns, weight, bias, y, y_stride, team):  # type: ignore[no-untyped-def]
    """Write `y`, flat, its rows `y_stride` elements apart; return 0, or NO_MEMORY.

    Args:
        tokens: codes, tails, block size, offsets and scales; see `_Tokens`.
        side_x: float32 [M, n_side], of the stored outlier columns and then of `found_columns`.
        weight: codes, absmax and outlier_weight of `reference.QuantizedWeight`.
        bias: empty if there is none.
    """
    n_tokens, n_side = side_x.shape
    n_parts = min(weight[0].size * (8 + n_tokens) // _MIN_WORK + 1, team[3])
    n_blocks = tokens[3].shape[0]
    n_packed = max(tokens[2] * N_ROWS, n_blocks * 4 * SUM_BYTES) if n_blocks > 1 else 0
    sum_bytes = (_tokens_of_round(n_tokens, weight[0].shape[1]) + N_TILE_TOKENS) * N_ROWS * 4
    part_bytes = aligned(sum_bytes + _TAIL_BYTES + _SPARE_BYTES + row_bytes(n_side) + n_packed)
    wide_stride = 0 if HAS_BYTE_PRODUCTS else 2 * -(-weight[0].shape[1] // N_CODES) * N_CODES
    memory = allocate(n_parts * part_bytes + n_tokens * wide_stride)
    if memory == 0:
        return NO_MEMORY
    wide = _WideTokens(aligned(memory) + n_parts * part_bytes, wide_stride)
    if wide_stride:
        _widen(tokens[0], view(wide.codes, (n_tokens, wide_stride // 2), np.int16(0)))
    args = (tokens, wide, side_x, found_columns, weight, bias, y, y_stride, aligned(memory), part_bytes)
    run_parts(_multiply, args, n_parts, team)
    release(memory)
    return 0


@compiled()
def _widen(codes, wide):  # type: ignore[no-untyped-def]
    n_columns = codes.shape[1]
    for t in range(codes.shape[0]):
        for k in range(n_columns):
            wide[t, k] = codes[t, k]
        wide[t, n_columns:] = 0


@compiled()
def int8_matmul(tokens, x_absmax, side, found_columns, weight, bias, y, y_stride, team):  # type: ignore[no-untyped-def]
    """Write `y`; return 0, or NO_MEMORY.

    Args:
        tokens, y: as in `multiply`; all of the tokens but codes and block size are written first.
        side: as in `dequantize_epilogue`.
    """
    codes, tails, block_size, offsets, scales = tokens
    outlier_x, found_x, side_x = side
    widen_side_x(outlier_x, found_x, side_x)
    offsets[:] = 0
    scales[:] = 0
    for t in range(codes.shape[0]):
        prepare_token(t, codes, x_absmax[t], tails, block_size, offsets, scales)
    return multiply(tokens, side_x, found_columns, weight, bias, y, y_stride, team)


@compiled()
def prepare_token(t, codes, absmax, tails, block_size, offsets, scales):  # type: ignore[no-untyped-def]
    """Write what `_Tokens` has of a token beside its codes."""
    _copy_tails(codes[t : t + 1], tails[t : t + 1])
    for b in range(absmax.size):
        block_sum = np.int32(0)
        for k in range(b * block_size, min((b + 1) * block_size, codes.shape[1])):
            block_sum += np.int32(codes[t, k])
        offsets[b, t] = OFFSET * block_sum
        scales[b, t] = absmax[b] / np.float32(N_STEPS)


@compiled()
def _copy_tails(codes, tails):  # type: ignore[no-untyped-def]
    """Copy the columns of each row that fill no vector."""
    n = codes.shape[1] % N_CODES
    for r in range(codes.shape[0] if n else 0):
        for k in range(n):
            tails[r, k] = codes[r, codes.shape[1] - n + k]


@compiled()
def _sum_by_rows(x, first, last, w, scratch, sums):  # type: ignore[no-untyped-def]
    """Write the scaled products of all blocks to float32 [last - first, 32] at `sums`; up to four tokens at once."""
    for t in range(first, last, 4):
        n, address = last - 1 - t, sums + (t - first) * 4 * N_ROWS
        codes, tails = x.codes + t * x.n_columns, x.tails + t * N_CODES
        if n == 0 and x.n_blocks == 1:
            _multiply_one_token(x, t, codes, tails, w, address)
        elif n == 0:
            _multiply_blocks_of_one_token(x, t, codes, tails, w, scratch, address)
        else:
            _multiply_rows(x, t, _four(codes, x.n_columns, n), _four(tails, N_CODES, n), w, address)


@compiled()
def _multiply_rows(x, t, xs, x_tails, w, sums):  # type: ignore[no-untyped-def]
    n_whole = x.n_columns // N_CODES * N_CODES
    for r in range(0, w.n, 4):
        n = w.n - 1 - r
        ws = _four(w.codes + r * w.stride, w.stride, n)
        row_sums, products, at, stop = zero_floats(xs), zero_sums(xs), 4 * t, x.block_size
        # One block has a loop without a branch: where registers are few, LLVM then spills fewer sums.
        for k in range(0, n_whole if x.n_blocks == 1 else 0, N_CODES):
            products = add_products(products, xs, ws, k)
        for k in range(0, n_whole if x.n_blocks > 1 else 0, N_CODES):
            if k == stop:
                row_sums = add_scaled_totals(row_sums, products, x.offsets + at, x.scales + at)
                products, at, stop = zero_sums(xs), at + 4 * x.n_padded, stop + x.block_size
            products = add_products(products, xs, ws, k)
        if n_whole < x.n_columns:
            if n_whole == stop:
                row_sums = add_scaled_totals(row_sums, products, x.offsets + at, x.scales + at)
                products, at = zero_sums(xs), at + 4 * x.n_padded
            products = add_products(products, x_tails, _four(w.tails + r * N_CODES, N_CODES, n), 0)
        row_sums = add_scaled_totals(row_sums, products, x.offsets + at, x.scales + at)
        store_row_sums(row_sums, sums + r * 4)


@compiled()
def _multiply_one_token(x, t, codes, tails, w, sums):  # type: ignore[no-untyped-def]
    """Write the scaled products of one token, which has one block. The rows are read one after the other."""
    n_whole, at = x.n_columns // N_CODES * N_CODES, 4 * t
    xs = (codes,)
    for r in range(0, w.n, 4):
        n = w.n - 1 - r
        r0, r1, r2, r3 = _four(w.codes + r * w.stride, w.stride, n)
        products = (
            row_products(codes, r0, n_whole),
            row_products(codes, r1, n_whole),
            row_products(codes, r2, n_whole),
            row_products(codes, r3, n_whole),
        )
        if n_whole < x.n_columns:
            products = add_products(products, (tails,), _four(w.tails + r * N_CODES, N_CODES, n), 0)
        row_sums = add_scaled_totals(zero_floats(xs), products, x.offsets + at, x.scales + at)
        store_row_sums(row_sums, sums + r * 4)


@compiled()
def _multiply_blocks_of_one_token(x, t, codes, tails, w, scratch, sums):  # type: ignore[no-untyped-def]
    """Write the scaled products of one token, block by block. `scratch` holds the sums of four rows for each block."""
    n_whole = x.n_columns // N_CODES * N_CODES
    for r in range(0, w.n, 4):
        n = w.n - 1 - r
        for i, row in enumerate(_four(w.codes + r * w.stride, w.stride, n)):
            for b in range(x.n_blocks):
                begin, stop = b * x.block_size, min((b + 1) * x.block_size, n_whole)
                store_sums(row_products(codes + begin, row + begin, stop - begin), scratch + (b * 4 + i) * SUM_BYTES)
        row_sums = zero_floats((codes,))
        for b in range(x.n_blocks):
            products, at = load_sums(scratch + b * 4 * SUM_BYTES), 4 * (b * x.n_padded + t)
            if b == x.n_blocks - 1 and n_whole < x.n_columns:
                products = add_products(products, (tails,), _four(w.tails + r * N_CODES, N_CODES, n), 0)
            row_sums = add_scaled_totals(row_sums, products, x.offsets + at, x.scales + at)
        store_row_sums(row_sums, sums + r * 4)


@compiled()
def _four(first, stride, n):  # type: ignore[no-untyped-def]
    """The addresses of four rows from `first` on, of which n follow it. The last one stands for those after it."""
    return first, first + min(1, n) * stride, first + min(2, n) * stride, first + min(3, n) * stride


@compiled()
def _sum_by_tiles(x, first, last, w, packed, sums):  # type: ignore[no-untyped-def]
    """Add what `_sum_by_rows` writes, in the same order, eight tokens at once."""
    n_whole = x.n_columns // N_CODES * N_CODES
    for b in range(x.n_blocks):
        begin = b * x.block_size
        n, n_tail = min((b + 1) * x.block_size, n_whole) - begin, 0
        for k in range(0, n, N_CODES):
            _pack(w.codes + begin + k, w.stride, w.n, packed + k * N_ROWS)
        if b == x.n_blocks - 1 and n_whole < x.n_columns:
            n_tail = N_CODES
            _pack(w.tails, N_CODES, w.n, packed + n * N_ROWS)
        for t in range(first, last, N_TILE_TOKENS):
            at, n_more = 4 * (b * x.n_padded + t), last - 1 - t
            codes, tails = x.codes + t * x.n_columns + begin, x.tails + t * N_CODES
            tile = start_tile(x.offsets + at)
            for k in range(0, n, 4):
                tile = add_to_tile(tile, codes + k, x.n_columns, n_more, packed + k * N_ROWS)
            for k in range(0, n_tail, 4):
                tile = add_to_tile(tile, tails + k, N_CODES, n_more, packed + (n + k) * N_ROWS)
            add_scaled_tile(tile, x.scales + at, sums + (t - first) * 4 * N_ROWS)


@compiled()
def _pack(codes, stride, n, packed):  # type: ignore[no-untyped-def]
    for r in range(0, N_ROWS, N_ROWS // 2):
        first = min(r, n - 1)
        pack_codes(codes + first * stride, stride, n - 1 - first, packed + r * 4)


@compiled()
def _sum_by_pairs(x, wide, first, last, w, sums):  # type: ignore[no-untyped-def]
    """Add what `_sum_by_rows` writes, in the same order, six tokens at once."""
    n_whole, is_alone = x.n_columns // N_CODES * N_CODES, last - first < _N_BY_TILES
    for t in range(first, last, 1 if is_alone else N_PAIR_TOKENS):
        for b in range(x.n_blocks):
            begin, scales = b * x.block_size, x.scales + 4 * (b * x.n_padded + t)
            n = min(begin + x.block_size, n_whole) - begin
            n_tail = N_CODES if b == x.n_blocks - 1 and n_whole < x.n_columns else 0
            tokens = (wide.codes + t * wide.stride + 2 * begin, wide.stride, last - 1 - t)
            for r in range(0, w.n, 1 if is_alone else N_PAIR_ROWS):
                rows = (w.codes + r * w.stride + begin, w.stride, w.n - 1 - r)
                tails = (w.tails + r * N_CODES, N_CODES, w.n - 1 - r)
                at = sums + 4 * ((t - first) * N_ROWS + r)
                if is_alone:
                    add_token_and_row(tokens, rows, n, tails, n_tail, scales, at)
                else:
                    add_tile(tokens, rows, n, tails, n_tail, scales, at)
