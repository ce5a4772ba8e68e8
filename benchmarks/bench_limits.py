"""What this machine can do at most: bytes read and copied, int8 products multiplied, each per second and thread count.

Measured, not looked up: a virtual machine gets what its host leaves it. A reading is an OR over all words, a product is
the inner tile of `int8_matmul` on operands that stay in the first cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import njit

from cuda_kernels.cpu.kernels.dequantize_epilogue import N_ROWS
from cuda_kernels.cpu.kernels.int8_vectors import (
    add_products,
    add_scaled_totals,
    store_row_sums,
    zero_floats,
    zero_sums,
)
from cuda_kernels.cpu.kernels.sizes import N_CODES
from cuda_kernels.cpu.threads import run_split

N_BYTES = 1 << 27
N_CALLS = 5
TILE_COLUMNS = 2048
N_TILE_ROWS = N_TILE_TOKENS = 4
N_TILES = 4000


def time_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_best(function: Callable[[], object]) -> float:
    """The shortest of several calls: a limit is what is reached when nothing disturbs."""
    return min(time_call(function) for _ in range(N_CALLS))


@njit(nogil=True)
def read_words(words):  # type: ignore[no-untyped-def]
    seen = np.int64(0)
    for word in words:
        seen |= word
    return seen


@njit(nogil=True)
def multiply_tiles(codes, weight_codes, scales, sums, n_tiles):  # type: ignore[no-untyped-def]
    x, w, s, n = codes.ctypes.data, weight_codes.ctypes.data, scales.ctypes.data, codes.shape[1]
    xs, ws = (x, x + n, x + 2 * n, x + 3 * n), (w, w + n, w + 2 * n, w + 3 * n)
    for _ in range(n_tiles):
        products = zero_sums(xs)
        for k in range(0, n, N_CODES):
            products = add_products(products, xs, ws, k)
        store_row_sums(add_scaled_totals(zero_floats(xs), products, s, s), sums.ctypes.data)


class Limits:
    """Holds the operands, larger than any cache where memory is meant, so that rounds do not pay for making them."""

    def __init__(self) -> None:
        self._words: npt.NDArray[np.int64] = np.ones(N_BYTES // 8, np.int64)
        self._copy = np.ones_like(self._words)
        self._codes = np.ones((N_TILE_TOKENS, TILE_COLUMNS), np.int8)
        self._weight_codes = np.ones((N_TILE_ROWS, TILE_COLUMNS), np.int8)
        self.read_gb_s(1), self.multiply_per_s(1)

    def read_gb_s(self, n_threads: int) -> float:
        def read(begin: int, end: int) -> None:
            read_words(self._words[begin:end])

        return N_BYTES / 1e9 / time_best(lambda: run_split(read, self._words.size, n_threads))

    def copy_gb_s(self, n_bytes: int, n_threads: int) -> float:
        """Bytes in per second; as many again go out."""
        source, target = self._words[: n_bytes // 8], self._copy[: n_bytes // 8]

        def copy(begin: int, end: int) -> None:
            np.copyto(target[begin:end], source[begin:end])

        return n_bytes / 1e9 / time_call(lambda: run_split(copy, source.size, n_threads))

    def multiply_per_s(self, n_threads: int) -> float:
        def multiply(begin: int, end: int) -> None:
            scales, sums = np.zeros(N_TILE_TOKENS, np.float32), np.empty((N_TILE_TOKENS, N_ROWS), np.float32)
            multiply_tiles(self._codes, self._weight_codes, scales, sums, end - begin)

        n_tiles = N_TILES * n_threads
        n_products = n_tiles * N_TILE_TOKENS * N_TILE_ROWS * TILE_COLUMNS
        return n_products / time_best(lambda: run_split(multiply, n_tiles, n_threads))
