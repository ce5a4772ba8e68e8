"""Instructions and reductions, by kernels that use each alone, in the PTX interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda

from cuda_kernels.cuda.launch import Kernel, Launch
from cuda_kernels.cuda.ptx.scalars import (
    high_as_float,
    larger_magnitudes,
    load_float,
    low_as_float,
    shuffle_up,
    shuffle_xor,
)
from cuda_kernels.cuda.reductions import block_max, block_sum, warp_max, warp_sum
from tests.kernels.cuda_backends import interpret
from tests.tools.ptx import Memory

types = cuda.types
u32 = np.uint32
F32, U32 = types.CPointer(types.float32), types.CPointer(types.uint32)


def run(function: Any, signature: tuple[Any, ...], arrays: list[Any], threads: int = 256, cc: Any = (9, 0)) -> None:
    memory = Memory()
    args = tuple(memory.place(each) if isinstance(each, np.ndarray) else each for each in arrays)
    interpret([Launch(Kernel(function, signature, threads), (1, 1, 1), 0, args)], memory, cc)


def widen_words(words, low, high, single):  # type: ignore[no-untyped-def]
    i = u32(cuda.threadIdx.x)
    while i < u32(32768):
        word = u32(words[u32(2) * i]) & u32(0xFFFF) | (u32(words[u32(2) * i + u32(1)]) & u32(0xFFFF)) << u32(16)
        low[i], high[i] = low_as_float(words, word), high_as_float(words, word)
        single[i] = load_float(words, u32(2) * i)
        i += u32(256)


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_both_halves_of_every_word_are_widened_exactly(format: str) -> None:
    bits = np.random.default_rng(0).permutation(65536).astype(np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    if format == "bf16":
        expected = (bits.astype(np.uint32) << 16).view(np.float32)
    element, outputs = {"fp16": types.uint16, "bf16": types.int16}[format], np.full((3, 32768), -1, np.float32)
    low, high, single = outputs
    run(widen_words, (types.CPointer(element), F32, F32, F32), [bits.copy(), low, high, single])
    np.testing.assert_array_equal(low, expected[::2])
    np.testing.assert_array_equal(high, expected[1::2])
    np.testing.assert_array_equal(single, expected[::2])


def largest_of_words(format, words, largest):  # type: ignore[no-untyped-def]
    i = u32(cuda.threadIdx.x)
    largest[i] = larger_magnitudes(format, largest[i], words[i])


@pytest.mark.parametrize("cc", [(7, 5), (9, 0)], ids=str)
def test_larger_magnitudes_drop_the_sign_and_keep_the_halves_apart(cc: tuple[int, int]) -> None:
    words, old = np.random.default_rng(1).integers(0, 1 << 32, (2, 256), np.uint32)
    old &= 0x7FFF7FFF
    for element, halves, mask in ((types.uint16, np.uint16, 0x7FFF), (types.uint32, np.uint32, 0x7FFFFFFF)):
        largest = old.copy()
        run(largest_of_words, (types.CPointer(element), U32, U32), [words, words, largest], cc=cc)
        expected = np.maximum(old.view(halves), words.view(halves) & halves(mask))
        np.testing.assert_array_equal(largest.view(halves), expected)


def load_far(x, y, index):  # type: ignore[no-untyped-def]
    y[0] = load_float(x, index)


def test_an_unsigned_index_reaches_past_two_billion() -> None:
    memory, x, y = Memory(), np.array([3.5], np.float32), np.zeros(1, np.float32)
    index = (1 << 32) - 5
    args = ((memory.place(x) - 4 * index) % (1 << 64), memory.place(y), index)
    interpret([Launch(Kernel(load_far, (F32, F32, types.uint32), 1), (1, 1, 1), 0, args)], memory)
    assert y[0] == 3.5


def shuffled(x, by_xor, by_up):  # type: ignore[no-untyped-def]
    i = u32(cuda.threadIdx.x)
    by_xor[i], by_up[i] = shuffle_xor(x[i], u32(5)), shuffle_up(x[i], u32(3))


def test_shuffles_move_values_between_lanes() -> None:
    x, lane = np.random.default_rng(2).standard_normal(64).astype(np.float32), np.arange(64)
    by_xor, by_up = np.zeros((2, 64), np.float32)
    run(shuffled, (F32, F32, F32), [x, by_xor, by_up], threads=64)
    np.testing.assert_array_equal(by_xor, x[lane ^ 5])
    np.testing.assert_array_equal(by_up, x[np.where(lane % 32 >= 3, lane - 3, lane)])


def reduced(numbers, x, out_numbers, out_x):  # type: ignore[no-untyped-def]
    largest, sums = cuda.shared.array(8, types.uint32), cuda.shared.array(8, types.float32)
    i = u32(cuda.threadIdx.x)
    out_numbers[i], out_numbers[i + u32(256)] = warp_max(numbers[i]), block_max(numbers[i], largest)
    out_x[i], out_x[i + u32(256)] = warp_sum(x[i]), block_sum(x[i], sums)


def test_every_thread_gets_the_maximum_and_the_sum() -> None:
    random = np.random.default_rng(3)
    numbers, x = random.integers(0, 1 << 32, 256, np.uint32), random.integers(-999, 999, 256).astype(np.float32)
    out_numbers, out_x = np.zeros((2, 256), np.uint32), np.zeros((2, 256), np.float32)
    run(reduced, (U32, F32, U32, F32), [numbers, x, out_numbers, out_x])
    np.testing.assert_array_equal(out_numbers[0], np.repeat(numbers.reshape(8, 32).max(axis=1), 32))
    np.testing.assert_array_equal(out_numbers[1], np.full(256, numbers.max()))
    np.testing.assert_array_equal(out_x[0], np.repeat(x.reshape(8, 32).sum(axis=1), 32))
    np.testing.assert_array_equal(out_x[1], np.full(256, x.sum()))


def summed_in_64_bits(x):  # type: ignore[no-untyped-def]
    x[0] = shuffle_xor(x[0] + x[1], u32(1))


def test_a_shuffle_of_64_bits_is_refused_with_the_reason() -> None:
    with pytest.raises(Exception, match="uint32 \\+ uint32 is uint64 in Numba"):
        Kernel(summed_in_64_bits, (U32,), 32).ptx((9, 0))
