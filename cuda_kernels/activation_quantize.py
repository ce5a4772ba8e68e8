"""Tokens to int8 codes on the GPU, their outlier columns set aside; the meaning is `reference.activation_quantize`.

    absmax[t]   = max_k |x[t, k]|                  over the columns that are no outlier columns
    inv_scale   = fl32(fl32(1 / absmax[t]) * 127)  0 where that is not finite
    codes[t, k] = rint(fl32(x[t, k] * inv_scale))  ties to even; 0 in outlier columns

1. A block takes a token, or several after each other when there are more than the device holds, and a thread 8 adjacent
   columns at a time. The token is read twice, the second time from the L1 cache.
2. Outlier columns are a bit each, in K / 8 bytes of shared memory, which a block sets from the stored list: a group of
   8 columns asks for one byte, nearly always 0.
3. Columns to be found: a bit each of 8 columns says whether some token reaches the threshold. For few tokens every
   block asks all of them itself (one launch in all); for many, a first launch gives each piece of the tokens a row of
   such bytes, and every block joins those rows.
4. Every block counts the bits in column order, so it knows which found columns are the first `capacity`, and which
   place in the list each has; the first block writes the list.

No atomics in global memory, no scratch that must be zero, no host synchronization, nothing left from call to call: the
launches can be captured in a graph, and give the same bits each time.

Bytes moved: M K of x (2 bytes, or 4) and M K codes, and x once more to find columns of many tokens. Floor on an H200 at
4.3 TB/s: M = 8192, K = 9216, fp16: 226 MB, 53 us, 88 with finding; for a few tokens, the latency of the launch. Not yet
measured on a GPU.

Columns that 8 does not divide, or addresses or row strides that 16 bytes do not, cost a load for every value: correct,
and slow. Non-finite values in the columns that are left show in `absmax`, and the token's codes are then 0.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy import float32, uint32, uint64

from cuda_kernels import group_intrinsics as group
from cuda_kernels.int8_operands import POINTER, check
from cuda_kernels.intrinsics import (
    bits_as_float,
    multiply_rn,
    population_count,
    reciprocal_rn,
    shuffle_up,
    store_8_bytes,
)
from cuda_kernels.launch import Kernel, Launch, run
from cuda_kernels.reductions import block_max
from cuda_kernels.reference import N_STEPS

if TYPE_CHECKING:
    import torch

GROUP = 8
MARK_THREADS = 256
STORED, OWN, MARKED = "stored columns alone", "found by every block", "found by a launch before"

_INFINITY = float32(np.inf)
_device = cuda.jit(device=True, inline="always")


class Operands(NamedTuple):
    """Addresses and sizes; shapes and dtypes as in `reference.activation_quantize`.

    row_stride: of x, in elements. marks: room for `mark_bytes`, of any content.
    """

    dtype: str
    x: int
    outlier_columns: int
    marks: int
    codes: int
    absmax: int
    outlier_x: int
    found_columns: int
    n_found: int
    found_x: int
    threshold: float
    n_tokens: int
    n_columns: int
    row_stride: int
    n_outliers: int
    capacity: int


class Plan(NamedTuple):
    """threads: of a block. tokens: of a block. own_tokens: up to how many tokens every block finds columns itself.
    mark_tokens: of a block of the launch that finds them otherwise."""

    threads: int
    tokens: int
    own_tokens: int
    mark_tokens: int


def plan(n_tokens: int, n_columns: int) -> Plan:
    """Few tokens: threads enough for one group each. Many: one wave of blocks. A guess, not yet measured."""
    n_groups, wave = -(-n_columns // GROUP), 132
    each = 1 if n_tokens <= 2 * wave else 4
    threads = next((t for t in (64, 256) if t * each >= n_groups), 1024 if each == 1 else 256)
    tokens = max(1, -(-n_tokens // (wave * (2048 // threads))))
    return Plan(threads, tokens, own_tokens=8, mark_tokens=max(16, -(-n_tokens // 64)))


def _make_load(is_aligned: bool) -> Any:
    @_device
    def load_aligned(x, start, k, K):  # type: ignore[no-untyped-def]
        return group.load8(x, start + k)

    @_device
    def load_any(x, start, k, K):  # type: ignore[no-untyped-def]
        return group.load8_before(x, start + k, start + K)

    return load_aligned if is_aligned else load_any


@cache
def _mark_kernel(dtype: str, is_aligned: bool) -> Kernel:
    load = _make_load(is_aligned)

    def mark_columns(x, marks, threshold, M, K, row_stride, n_groups, tokens):  # type: ignore[no-untyped-def]
        # marks uint8 [pieces, n_groups]. Grid: groups of columns, a thread each, x pieces of `tokens` tokens.
        g = uint64(cuda.blockIdx.x) * uint64(MARK_THREADS) + uint64(cuda.threadIdx.x)
        if g >= n_groups:
            return
        piece = uint64(cuda.blockIdx.y)
        token = piece * tokens
        last = min(token + tokens, M) - uint64(1)
        marked = uint32(0)
        while token <= last:
            # Four loads before the first use; beyond the last token it is asked again, which changes nothing.
            k = g * uint64(GROUP)
            a = load(x, token * row_stride, k, K)
            b = load(x, min(token + uint64(1), last) * row_stride, k, K)
            c = load(x, min(token + uint64(2), last) * row_stride, k, K)
            d = load(x, min(token + uint64(3), last) * row_stride, k, K)
            marked |= group.at_least(a, threshold) | group.at_least(b, threshold)
            marked |= group.at_least(c, threshold) | group.at_least(d, threshold)
            token += uint64(4)
        marks[piece * n_groups + g] = marked

    sizes = [types.uint64] * 5
    return Kernel(mark_columns, (POINTER[dtype], types.CPointer(types.uint8), types.uint32, *sizes), MARK_THREADS)


def _make_marks(finding: str, is_aligned: bool) -> Any:
    """(x, marks, g, threshold, pieces, M, K, row_stride, n_groups) -> which of 8 columns some token reaches."""
    load = _make_load(is_aligned)

    @_device
    def own(x, marks, g, threshold, pieces, M, K, row_stride, n_groups):  # type: ignore[no-untyped-def]
        marked = uint32(0)
        for token in range(M):
            marked |= group.at_least(load(x, uint64(token) * row_stride, g * uint64(GROUP), K), threshold)
        return marked

    @_device
    def joined(x, marks, g, threshold, pieces, M, K, row_stride, n_groups):  # type: ignore[no-untyped-def]
        marked = uint32(0)
        for piece in range(pieces):
            marked |= uint32(marks[uint64(piece) * n_groups + g])
        return marked

    return own if finding == OWN else joined


@_device
def _take_stored(mask, x, outlier_columns, outlier_x, first, end, row_stride, n, n_words, threads):  # type: ignore[no-untyped-def]
    """Set the bits of the stored columns in `mask`, and gather the columns of tokens first ... end - 1."""
    for i in range(cuda.threadIdx.x, n_words, threads):
        mask[i] = uint32(0)
    cuda.syncthreads()
    for j in range(cuda.threadIdx.x, n, threads):
        column = uint64(outlier_columns[j])
        cuda.atomic.or_(mask, column // uint64(32), uint32(uint64(1) << column % uint64(32)))
        for token in range(first, end):
            outlier_x[uint64(token) * n + uint64(j)] = x[uint64(token) * row_stride + column]
    cuda.syncthreads()


def _make_take_found(finding: str, is_aligned: bool, threads: int) -> Any:
    """Set the bits of the first `capacity` found columns in `mask`, and gather them as well."""
    marks_of, warps = _make_marks(finding, is_aligned), threads // 32

    @_device
    def take_found(mask, scratch, x, marks, found_columns, n_found, found_x, threshold, pieces, first, end, M, K, row_stride, n_groups, capacity):  # type: ignore[no-untyped-def]  # fmt: skip
        thread, is_first_block = uint32(cuda.threadIdx.x), cuda.blockIdx.x == 0
        lane, warp = thread % uint32(32), thread // uint32(32)
        total, g0 = uint64(0), uint64(0)
        while g0 < n_groups:
            g = g0 + uint64(thread)
            found, shift = uint32(0), uint32(g % uint64(4)) * uint32(8)
            if g < n_groups:
                stored = uint32(mask[g // uint64(4)] >> shift)
                found = uint32(marks_of(x, marks, g, threshold, pieces, M, K, row_stride, n_groups) & ~stored)
            count = population_count(found)
            up_to_here = count
            for distance in (1, 2, 4, 8, 16):
                below = shuffle_up(up_to_here, uint32(distance))
                if lane >= uint32(distance):
                    up_to_here = uint32(up_to_here + below)
            if lane == uint32(31):
                scratch[warp] = up_to_here
            cuda.syncthreads()
            place = total + uint64(up_to_here - count)
            for w in range(warps):
                if w < warp:
                    place += uint64(scratch[w])
                total += uint64(scratch[w])
            taken = uint32(0)
            for bit in range(GROUP):
                if found >> uint32(bit) & uint32(1):
                    if place < capacity:
                        taken |= uint32(1) << uint32(bit)
                        column = g * uint64(GROUP) + uint64(bit)
                        if is_first_block:
                            found_columns[place] = column
                        for token in range(first, end):
                            found_x[uint64(token) * capacity + place] = x[uint64(token) * row_stride + column]
                    place += uint64(1)
            if taken:
                cuda.atomic.or_(mask, g // uint64(4), uint32(taken << shift))
            cuda.syncthreads()
            g0 += uint64(threads)
        for j in range(min(total, capacity) + uint64(thread), capacity, threads):
            if is_first_block:
                found_columns[j] = -1
            for token in range(first, end):
                found_x[uint64(token) * capacity + uint64(j)] = 0
        return total

    return take_found


def _make_quantize_token(is_aligned: bool, threads: int) -> Any:
    load = _make_load(is_aligned)

    @_device
    def without_excluded(mask, g, values):  # type: ignore[no-untyped-def]
        excluded = uint32(mask[g // uint64(4)] >> (uint32(g % uint64(4)) * uint32(8))) & uint32(0xFF)
        if excluded:
            values = group.clear(values, uint32(excluded))
        return values

    @_device
    def largest_magnitude(mask, x, start, K, n_groups):  # type: ignore[no-untyped-def]
        largest, last = uint32(0), n_groups - uint64(1)
        for i in range(cuda.threadIdx.x, n_groups, 4 * threads):
            # Four loads before the first use; beyond the last group it is asked again, which changes nothing.
            g = uint64(i)
            g1, g2, g3 = min(g + uint64(threads), last), min(g + uint64(2 * threads), last), min(g + uint64(3 * threads), last)  # fmt: skip
            a, b = load(x, start, g * uint64(GROUP), K), load(x, start, g1 * uint64(GROUP), K)
            c, d = load(x, start, g2 * uint64(GROUP), K), load(x, start, g3 * uint64(GROUP), K)
            largest = group.largest_magnitude(without_excluded(mask, g, a), largest)
            largest = group.largest_magnitude(without_excluded(mask, g1, b), largest)
            largest = group.largest_magnitude(without_excluded(mask, g2, c), largest)
            largest = group.largest_magnitude(without_excluded(mask, g3, d), largest)
        return largest

    @_device
    def quantize_token(mask, scratch, x, codes, absmax, token, K, row_stride, n_groups):  # type: ignore[no-untyped-def]
        start = token * row_stride
        largest = largest_magnitude(mask, x, start, K, n_groups)
        largest_of_all = bits_as_float(uint32(block_max(largest, scratch)))
        inv_scale = multiply_rn(reciprocal_rn(largest_of_all), float32(N_STEPS))
        if not inv_scale < _INFINITY:
            inv_scale = float32(0)
        if cuda.threadIdx.x == 0:
            absmax[token] = largest_of_all
        for i in range(cuda.threadIdx.x, n_groups, threads):
            g = uint64(i)
            values = without_excluded(mask, g, load(x, start, g * uint64(GROUP), K))
            if inv_scale == float32(0):  # Infinity times 0 would make other codes than 0.
                values = group.clear(values, uint32(0xFF))
            words, at = group.quantize(values, inv_scale), token * K + g * uint64(GROUP)
            if is_aligned:
                store_8_bytes(codes, at, words[0], words[1])
            else:
                group.store_codes_before(codes, at, (token + uint64(1)) * K, words)
        cuda.syncthreads()  # `scratch` is the next token's.

    return quantize_token


@cache
def _token_kernel(dtype: str, finding: str, is_aligned: bool, threads: int) -> Kernel:
    take_found, quantize_token = _make_take_found(finding, is_aligned, threads), _make_quantize_token(is_aligned, threads)
    warps, is_finding = threads // 32, finding != STORED

    def activation_quantize(x, outlier_columns, marks, codes, absmax, outlier_x, found_columns, n_found, found_x,
                            threshold, M, K, row_stride, n, capacity, pieces, tokens):  # type: ignore[no-untyped-def]  # fmt: skip
        # x [M, K], rows `row_stride` apart; marks uint8 [pieces, K / 8]; the rest as in the reference.
        # Grid: `tokens` tokens a block. Dynamic shared memory: a bit for each column, in words.
        mask, scratch = cuda.shared.array(0, types.uint32), cuda.shared.array(warps, types.uint32)
        n_groups = (K + uint64(GROUP - 1)) // uint64(GROUP)
        first = uint64(cuda.blockIdx.x) * tokens
        end = min(first + tokens, M)
        _take_stored(mask, x, outlier_columns, outlier_x, first, end, row_stride, n, (n_groups + uint64(3)) // uint64(4), threads)  # fmt: skip
        total = uint64(0)
        if is_finding:
            total = take_found(mask, scratch, x, marks, found_columns, n_found, found_x, threshold, pieces, first, end, M, K, row_stride, n_groups, capacity)  # fmt: skip
        if cuda.blockIdx.x == 0 and cuda.threadIdx.x == 0:
            n_found[0] = total
        for token in range(first, end):
            quantize_token(mask, scratch, x, codes, absmax, uint64(token), K, row_stride, n_groups)

    values, floats, columns = POINTER[dtype], types.CPointer(types.float32), types.CPointer(types.int32)
    bytes_, codes = types.CPointer(types.uint8), types.CPointer(types.int8)
    pointers = (values, columns, bytes_, codes, floats, values, columns, columns, values)
    return Kernel(activation_quantize, (*pointers, types.uint32, *[types.uint64] * 7), threads)


def mark_bytes(n_tokens: int, n_columns: int, capacity: int, cut: Plan) -> int:
    """How much room the launch that finds columns needs; 0 where there is none."""
    is_marking = capacity > 0 and n_tokens > cut.own_tokens
    return -(-n_tokens // cut.mark_tokens) * -(-n_columns // GROUP) if is_marking else 0


def launches(operands: Operands, cut: Plan) -> list[Launch]:
    """One launch, or two where columns of many tokens are to be found. At least one token."""
    o = operands
    item_bytes = 4 if o.dtype == "F32" else 2
    is_aligned = (o.x | o.row_stride * item_bytes) % 16 == 0 and (o.codes | o.n_columns) % GROUP == 0
    n_groups, pieces = -(-o.n_columns // GROUP), -(-o.n_tokens // cut.mark_tokens)
    threshold = int(np.float32(o.threshold).view(np.uint32)) if o.capacity else 0
    planned, finding = [], STORED
    if mark_bytes(o.n_tokens, o.n_columns, o.capacity, cut):
        finding = MARKED
        sizes = (o.n_tokens, o.n_columns, o.row_stride, n_groups, cut.mark_tokens)
        grid = (-(-n_groups // MARK_THREADS), pieces, 1)
        planned.append(Launch(_mark_kernel(o.dtype, is_aligned), grid, 0, (o.x, o.marks, threshold, *sizes)))
    elif o.capacity:
        finding = OWN
    pointers = (o.x, o.outlier_columns, o.marks, o.codes, o.absmax, o.outlier_x, o.found_columns, o.n_found, o.found_x)
    sizes = (o.n_tokens, o.n_columns, o.row_stride, o.n_outliers, o.capacity, pieces, cut.tokens)
    kernel = _token_kernel(o.dtype, finding, is_aligned, cut.threads)
    grid = (-(-o.n_tokens // cut.tokens), 1, 1)
    planned.append(Launch(kernel, grid, -(-n_groups // 4) * 4, (*pointers, threshold, *sizes)))
    return planned
