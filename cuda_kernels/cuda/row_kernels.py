"""The kernels of `row_quantize`, from naive to fast: by values, a warp for a row, a block for a row.

The order of the float operations is the method's. Sums of squares are always added in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda.launch import Kernel
from cuda_kernels.cuda.ptx.scalars import (
    add_rn,
    bits_as_float,
    element_bytes,
    float_as_bits,
    high_as_float,
    larger_magnitudes,
    load_16_bytes,
    load_float,
    low_as_float,
    multiply_rn,
    permute_bytes,
    reciprocal_rn,
    store_16_bytes,
    stream_16_bytes,
    stream_store_4_bytes,
    stream_store_8_bytes,
)
from cuda_kernels.cuda.reductions import block_max, block_sum, warp_max, warp_sum
from cuda_kernels.reference import N_STEPS

u32, u64, f32 = np.uint32, np.uint64, np.float32

THREADS = 256
WARPS = THREADS // 32

VECTOR_BYTES = 16
WARP_ROW_BYTES = 4 * 32 * VECTOR_BYTES
"""Bytes of a row that a warp holds: four loads of 16 bytes a lane, all in flight at once."""

WARP_WORDS = WARPS * WARP_ROW_BYTES // 4
ROUNDER = f32(3 << 22)
"""x + 1.5 * 2^23 has no bits for a fraction: the sum rounds x to an integer, ties to even, and holds it, modulo 256, in
its lowest byte. For |x| < 2^22. Two additions, where a conversion and one back run at half their rate or less."""

FLOAT_MAX = np.finfo(f32).max
SIGN_CLEARED = u32(0x7FFFFFFF)


@cuda.jit(device=True, inline="always")
def _inv_scale(absmax):  # type: ignore[no-untyped-def]
    inv_scale = multiply_rn(reciprocal_rn(absmax), f32(N_STEPS))
    return inv_scale if inv_scale <= FLOAT_MAX else f32(0)  # NaN compares false


@cuda.jit(device=True, inline="always")
def _quantize_value(x, inv_scale, codes, signal, noise):  # type: ignore[no-untyped-def]
    """Return the word `codes` with this value's code shifted in from above, and the two sums, in squared steps."""
    in_steps = multiply_rn(x, inv_scale)
    rounded = add_rn(in_steps, ROUNDER)
    error = in_steps - (rounded - ROUNDER)
    codes = permute_bytes(codes, float_as_bits(rounded), u32(0x4321))
    return codes, signal + in_steps * in_steps, noise + error * error


@cuda.jit(device=True, inline="always")
def _quantize_pairs(weight, words, inv_scale, signal, noise):  # type: ignore[no-untyped-def]
    """Return one word of codes for two words of two values each, and the two sums."""
    codes = u32(0)
    for word in words:
        codes, signal, noise = _quantize_value(low_as_float(weight, word), inv_scale, codes, signal, noise)
        codes, signal, noise = _quantize_value(high_as_float(weight, word), inv_scale, codes, signal, noise)
    return codes, signal, noise


@cuda.jit(device=True, inline="always")
def _quantize_vector(weight, words, inv_scale, codes, at, signal, noise):  # type: ignore[no-untyped-def]
    """Write the codes of one vector, 8 values or 4; return the two sums."""
    if element_bytes(weight) == u32(4):
        first = u32(0)
        for word in words:
            first, signal, noise = _quantize_value(bits_as_float(word), inv_scale, first, signal, noise)
        stream_store_4_bytes(codes, at, first)
    else:
        first, signal, noise = _quantize_pairs(weight, words[:2], inv_scale, signal, noise)
        second, signal, noise = _quantize_pairs(weight, words[2:], inv_scale, signal, noise)
        stream_store_8_bytes(codes, at, first, second)
    return signal, noise


@cuda.jit(device=True, inline="always")
def _keep(weight, words, kept, slot, n_slots, largest):  # type: ignore[no-untyped-def]
    """Store a vector of the row in shared memory; return the largest magnitudes."""
    if slot < n_slots:
        store_16_bytes(kept, u32(slot * u32(4)), words[0], words[1], words[2], words[3])
    for word in words:
        largest = larger_magnitudes(weight, largest, word)
    return largest


@cuda.jit(device=True, inline="always")
def _one_magnitude(weight, largest):  # type: ignore[no-untyped-def]
    """The larger half of a pair, or the whole, as the bits of a float32, in the same order."""
    if element_bytes(weight) == u32(4):
        return largest
    return max(float_as_bits(low_as_float(weight, largest)), float_as_bits(high_as_float(weight, largest)))


def _row_by_values(weight, codes, absmax, signal, noise, columns, row_stride):  # type: ignore[no-untyped-def]
    # weight [rows, columns] of fp16, bf16 or fp32, rows `row_stride` values apart; codes int8 [rows, columns]
    # one block a row, THREADS threads
    scratch = cuda.shared.array(WARPS, types.uint32)
    signals, noises = cuda.shared.array(WARPS, types.float32), cuda.shared.array(WARPS, types.float32)
    row, thread = u64(u32(cuda.blockIdx.x)), u32(cuda.threadIdx.x)
    largest = u32(0)
    k = thread
    while k < columns:
        magnitude = u32(float_as_bits(load_float(weight, row * row_stride + u64(k))) & SIGN_CLEARED)
        largest = max(largest, magnitude)
        k += u32(THREADS)
    row_absmax = bits_as_float(block_max(largest, scratch))
    inv_scale = _inv_scale(row_absmax)
    row_signal, row_noise = f32(0), f32(0)
    k = thread
    while k < columns:
        x = load_float(weight, row * row_stride + u64(k))
        code, row_signal, row_noise = _quantize_value(x, inv_scale, u32(0), row_signal, row_noise)
        codes[row * u64(columns) + u64(k)] = types.int8(code >> u32(24))
        k += u32(THREADS)
    row_signal, row_noise = block_sum(row_signal, signals), block_sum(row_noise, noises)
    if thread == u32(0):
        absmax[row], signal[row], noise[row] = row_absmax, row_signal, row_noise


def _row_of_a_warp(weight, codes, absmax, signal, noise, rows, vectors, row_stride):  # type: ignore[no-untyped-def]
    # a row is `vectors` <= 128 times 16 bytes; a warp each, WARPS rows a block
    # new: loads of 16 bytes, four of them under way at once, and a row that is read once
    kept = cuda.shared.array(WARP_WORDS, types.uint32, alignment=16)
    lane, warp, last = u32(cuda.laneid), u32(u32(cuda.threadIdx.x) >> u32(5)), u32(vectors - u32(1))
    row = u64(u32(cuda.blockIdx.x)) * u64(WARPS) + u64(warp)
    if row >= u64(rows):
        return
    per_vector = u64(u32(VECTOR_BYTES) // element_bytes(weight))
    start, codes_start = row * row_stride, row * u64(vectors) * per_vector
    # Lanes past the end load the last vector again: that changes no maximum and needs no branch.
    a = stream_16_bytes(weight, start + u64(min(lane, last)) * per_vector)
    b = stream_16_bytes(weight, start + u64(min(u32(lane + u32(32)), last)) * per_vector)
    c = stream_16_bytes(weight, start + u64(min(u32(lane + u32(64)), last)) * per_vector)
    d = stream_16_bytes(weight, start + u64(min(u32(lane + u32(96)), last)) * per_vector)
    slot = u32(warp * u32(WARP_ROW_BYTES // VECTOR_BYTES))
    largest = _keep(weight, a, kept, u32(slot + lane), u32(slot + vectors), u32(0))
    largest = _keep(weight, b, kept, u32(slot + lane + u32(32)), u32(slot + vectors), largest)
    largest = _keep(weight, c, kept, u32(slot + lane + u32(64)), u32(slot + vectors), largest)
    largest = _keep(weight, d, kept, u32(slot + lane + u32(96)), u32(slot + vectors), largest)
    row_absmax = bits_as_float(warp_max(_one_magnitude(weight, largest)))
    inv_scale = _inv_scale(row_absmax)
    row_signal, row_noise = f32(0), f32(0)
    i = lane
    while i < vectors:
        words = load_16_bytes(kept, u32((slot + i) * u32(4)))
        at = codes_start + u64(i) * per_vector
        row_signal, row_noise = _quantize_vector(weight, words, inv_scale, codes, at, row_signal, row_noise)
        i = u32(i + u32(32))
    row_signal, row_noise = warp_sum(row_signal), warp_sum(row_noise)
    if lane == u32(0):
        absmax[row], signal[row], noise[row] = row_absmax, row_signal, row_noise


def _row_of_a_block(weight, codes, absmax, signal, noise, vectors, n_kept, row_stride):  # type: ignore[no-untyped-def]
    # a row is `vectors` times 16 bytes, the first `n_kept` of them kept in as much dynamic shared memory; a block each
    # new: rows of any length; a thread reads back what it wrote itself, so that the kept row needs no barrier
    kept = cuda.shared.array(0, types.uint32, alignment=16)
    scratch = cuda.shared.array(WARPS, types.uint32)
    signals, noises = cuda.shared.array(WARPS, types.float32), cuda.shared.array(WARPS, types.float32)
    row, thread, last = u64(u32(cuda.blockIdx.x)), u32(cuda.threadIdx.x), u32(vectors - u32(1))
    per_vector = u64(u32(VECTOR_BYTES) // element_bytes(weight))
    start, codes_start = row * row_stride, row * u64(vectors) * per_vector
    largest = u32(0)
    i = thread
    while i < vectors:
        second, third, fourth = u32(i + u32(THREADS)), u32(i + u32(2 * THREADS)), u32(i + u32(3 * THREADS))
        a = stream_16_bytes(weight, start + u64(i) * per_vector)
        b = stream_16_bytes(weight, start + u64(min(second, last)) * per_vector)
        c = stream_16_bytes(weight, start + u64(min(third, last)) * per_vector)
        d = stream_16_bytes(weight, start + u64(min(fourth, last)) * per_vector)
        largest = _keep(weight, a, kept, i, n_kept, largest)
        largest = _keep(weight, b, kept, second, n_kept, largest)
        largest = _keep(weight, c, kept, third, n_kept, largest)
        largest = _keep(weight, d, kept, fourth, n_kept, largest)
        i = u32(i + u32(4 * THREADS))
    row_absmax = bits_as_float(block_max(_one_magnitude(weight, largest), scratch))
    inv_scale = _inv_scale(row_absmax)
    row_signal, row_noise = f32(0), f32(0)
    i = thread
    while i < vectors:
        if i < n_kept:
            words = load_16_bytes(kept, u32(i * u32(4)))
        else:
            words = stream_16_bytes(weight, start + u64(i) * per_vector)
        at = codes_start + u64(i) * per_vector
        row_signal, row_noise = _quantize_vector(weight, words, inv_scale, codes, at, row_signal, row_noise)
        i = u32(i + u32(THREADS))
    row_signal, row_noise = block_sum(row_signal, signals), block_sum(row_noise, noises)
    if thread == u32(0):
        absmax[row], signal[row], noise[row] = row_absmax, row_signal, row_noise


def _kernel(function: Callable[..., None], weight: Any, *sizes: Any) -> Kernel:
    floats = types.CPointer(types.float32)
    outputs = (types.CPointer(types.int8), floats, floats, floats)
    return Kernel(function, (types.CPointer(weight), *outputs, *sizes, types.uint64), THREADS)


_BITS = {"F16": types.uint16, "BF16": types.int16, "F32": types.uint32}
BY_VALUES = {dtype: _kernel(_row_by_values, bits, types.uint32) for dtype, bits in _BITS.items()}
OF_A_WARP = {dtype: _kernel(_row_of_a_warp, bits, types.uint32, types.uint32) for dtype, bits in _BITS.items()}
OF_A_BLOCK = {dtype: _kernel(_row_of_a_block, bits, types.uint32, types.uint32) for dtype, bits in _BITS.items()}
