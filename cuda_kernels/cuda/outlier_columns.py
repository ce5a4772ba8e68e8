"""The outlier columns of x, as one bit for each column in shared memory: a part of `activation_quantize`.

1. A thread takes a group of 8 adjacent columns: a byte, which is nearly always 0.
2. The bits of stored columns come from their list.
3. The bits of found columns come from x. For few tokens, every block reads all tokens. For many, an earlier launch
   (`mark_kernel`) has written a row of bytes for each piece of the tokens, and every block joins those rows.
4. Every block counts the found bits in column order, so it knows the place of each in the list, and the first
   `capacity` of them. The first block writes the list.

Every block computes the same, so none waits for another: no atomics in global memory, no scratch that must be zero.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import cuda
from numba.cuda import types
from numpy import uint32

from cuda_kernels.cuda.int8_operands import POINTER
from cuda_kernels.cuda.launch import Kernel
from cuda_kernels.cuda.ptx import groups as group
from cuda_kernels.cuda.ptx.groups import GROUP
from cuda_kernels.cuda.ptx.scalars import population_count, shuffle_up

MARK_THREADS = 256

_device = cuda.jit(device=True, inline="always")


@cache
def mark_kernel(dtype: str, is_aligned: bool) -> Kernel:
    """Make the kernel that writes a byte for each piece of the tokens and each group: the columns with an outlier."""
    load = group.load(is_aligned)

    def mark_columns(x, marks, threshold, M, K, row_stride, n_groups, tokens):  # type: ignore[no-untyped-def]
        # x [M, K]; marks uint8 [pieces, n_groups]. Grid: groups, a thread each, x pieces of `tokens` tokens.
        g = cuda.blockIdx.x * MARK_THREADS + cuda.threadIdx.x
        if g >= n_groups:
            return
        piece = cuda.blockIdx.y
        token = piece * tokens
        last = min(token + tokens, M) - 1
        marked = uint32(0)
        while token <= last:
            # Four loads before the first use. Past the last token it is loaded again, which changes nothing.
            a = load(x, token * row_stride, g, K)
            b = load(x, min(token + 1, last) * row_stride, g, K)
            c = load(x, min(token + 2, last) * row_stride, g, K)
            d = load(x, min(token + 3, last) * row_stride, g, K)
            marked |= group.at_least(a, threshold) | group.at_least(b, threshold)
            marked |= group.at_least(c, threshold) | group.at_least(d, threshold)
            token += 4
        marks[piece * n_groups + g] = marked

    sizes = [types.int64] * 5
    return Kernel(mark_columns, (POINTER[dtype], types.CPointer(types.uint8), types.uint32, *sizes), MARK_THREADS)


def make_marks(is_marked_before: bool, is_aligned: bool) -> Any:
    """Make (x, marks, g, threshold, pieces, shape) -> the byte of all tokens, from x itself or from the marks."""
    load = group.load(is_aligned)

    @_device
    def of_tokens(x, marks, g, threshold, pieces, shape):  # type: ignore[no-untyped-def]
        M, K, row_stride, _ = shape
        marked = uint32(0)
        for token in range(M):
            marked |= group.at_least(load(x, token * row_stride, g, K), threshold)
        return marked

    @_device
    def of_pieces(x, marks, g, threshold, pieces, shape):  # type: ignore[no-untyped-def]
        marked = uint32(0)
        for piece in range(pieces):
            marked |= uint32(marks[piece * shape[3] + g])
        return marked

    return of_pieces if is_marked_before else of_tokens


def make_take_stored(threads: int) -> Any:
    """Make the function that sets the bits of stored columns alone, and gathers these from a range of tokens."""

    @_device
    def take_stored(bits, x, outlier_columns, outlier_x, first, end, n, shape):  # type: ignore[no-untyped-def]
        for i in range(cuda.threadIdx.x, (shape[3] + 3) // 4, threads):
            bits[i] = uint32(0)
        cuda.syncthreads()
        for j in range(cuda.threadIdx.x, n, threads):
            column = outlier_columns[j]
            cuda.atomic.or_(bits, column // 32, uint32(1 << column % 32))
            for token in range(first, end):
                outlier_x[token * n + j] = x[token * shape[2] + column]
        cuda.syncthreads()

    return take_stored


def _make_running_sum(threads: int) -> Any:
    """Make (count, scratch, total) -> total plus the counts of earlier threads, and total plus all counts."""
    warps = threads // 32

    @_device
    def running_sum(count, scratch, total):  # type: ignore[no-untyped-def]
        lane, warp = uint32(cuda.threadIdx.x) % uint32(32), uint32(cuda.threadIdx.x) // uint32(32)
        up_to_here = count
        for distance in (1, 2, 4, 8, 16):
            below = shuffle_up(up_to_here, uint32(distance))
            if lane >= uint32(distance):
                up_to_here = uint32(up_to_here + below)
        if lane == uint32(31):
            scratch[warp] = up_to_here
        cuda.syncthreads()
        place = total + up_to_here - count
        for w in range(warps):
            if w < warp:
                place += scratch[w]
            total += scratch[w]
        return place, total

    return running_sum


def make_take_found(is_marked_before: bool, is_aligned: bool, threads: int) -> Any:
    """Make the function that sets the bits of the first `capacity` found columns, lists and gathers them.

    It gathers from tokens first ... end - 1, and returns how many columns were found. `scratch` is a shared uint32 for
    each warp.
    """
    marks_of, running_sum = make_marks(is_marked_before, is_aligned), _make_running_sum(threads)

    @_device
    def take_found(bits, scratch, x, marks, found, threshold, pieces, first, end, capacity, shape):  # type: ignore[no-untyped-def]
        found_columns, found_x = found
        is_first_block = cuda.blockIdx.x == 0
        total, g0 = 0, 0
        while g0 < shape[3]:
            g, new, taken = g0 + cuda.threadIdx.x, uint32(0), uint32(0)
            if g < shape[3]:
                new = uint32(marks_of(x, marks, g, threshold, pieces, shape) & ~group.byte_of(bits, g))
            place, total = running_sum(population_count(new), scratch, total)
            while new != uint32(0):
                lowest = uint32(new & (~new + uint32(1)))
                if place < capacity:
                    taken |= lowest
                    column = g * GROUP + population_count(uint32(lowest - uint32(1)))
                    if is_first_block:
                        found_columns[place] = column
                    for token in range(first, end):
                        found_x[token * capacity + place] = x[token * shape[2] + column]
                place += 1
                new = uint32(new ^ lowest)
            if taken:
                cuda.atomic.or_(bits, g // 4, uint32(taken << (uint32(g % 4) * uint32(8))))
            cuda.syncthreads()
            g0 += threads
        for j in range(min(total, capacity) + cuda.threadIdx.x, capacity, threads):
            if is_first_block:
                found_columns[j] = -1
            for token in range(first, end):
                found_x[token * capacity + j] = 0
        return total

    return take_found
