"""Sums of int8 products in registers, by the instructions of this processor and by those of an old one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

PROGRAM = """
import numpy as np
from numba import njit
from cuda_kernels.cpu.kernels.int8_pairs import add_tile, add_token_and_row
from cuda_kernels.cpu.kernels.int8_tiles import add_scaled_tile, add_to_tile, pack_codes, start_tile
from cuda_kernels.cpu.kernels.int8_vectors import HAS_BYTE_PRODUCTS, add_products, add_scaled_totals
from cuda_kernels.cpu.kernels.int8_vectors import store_row_sums, zero_floats, zero_sums

@njit
def by_rows(x, w, offsets, scales, y):  # one token, the first four rows
    a, b, n = x.ctypes.data, w.ctypes.data, x.shape[1]
    xs, ws = (a,), (b, b + n, b + 2 * n, b + 3 * n)
    sums = zero_sums(xs)
    for k in range(0, n, 64):
        sums = add_products(sums, xs, ws, k)
    row_sums = add_scaled_totals(zero_floats(xs), sums, offsets.ctypes.data, scales.ctypes.data)
    store_row_sums(row_sums, y.ctypes.data)

@njit
def by_tiles(x, w, offsets, scales, y):
    n, packed = x.shape[1], np.empty(w.size, np.uint8)
    for k in range(0, n, 64):
        for r in (0, 16):
            pack_codes(w.ctypes.data + r * n + k, n, 15, packed.ctypes.data + 32 * k + 4 * r)
    tile = start_tile(offsets.ctypes.data)
    for k in range(0, n, 4):
        tile = add_to_tile(tile, x.ctypes.data + k, n, 7, packed.ctypes.data + 32 * k)
    add_scaled_tile(tile, scales.ctypes.data, y.ctypes.data)

@njit
def by_pairs(wide, w, scales, y):  # columns past a multiple of 64 as a tail
    n = w.shape[1] // 128 * 64
    for t in range(0, 8, 6):
        for r in range(0, 32, 2):
            rows = (w.ctypes.data + r * w.shape[1], w.shape[1], 31 - r)
            tails = (rows[0] + n, w.shape[1], 31 - r)
            tokens = (wide.ctypes.data + 2 * t * w.shape[1], 2 * w.shape[1], 7 - t)
            at = y.ctypes.data + 4 * (32 * t + r)
            add_tile(tokens, rows, n, tails, w.shape[1] - n, scales.ctypes.data + 4 * t, at)

@njit
def by_pair_rows(wide, w, scales, y):
    for t in range(8):
        for r in range(32):
            rows = (w.ctypes.data + r * w.shape[1], 0, 0)
            tokens = (wide.ctypes.data + 2 * t * w.shape[1], 0, 0)
            at = y.ctypes.data + 4 * (32 * t + r)
            add_token_and_row(tokens, rows, w.shape[1], rows, 0, scales.ctypes.data + 4 * t, at)

def check(x, w):
    offsets = 128 * x.astype(np.int32).sum(1, dtype=np.int32)
    scales = 2 ** np.arange(8, dtype=np.float32)
    expected = (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32) * scales[:, None]
    for kernel in (by_pairs, by_pair_rows):
        y, padded = np.zeros((12, 32), np.float32), np.zeros(12, np.float32)
        padded[:8] = scales
        kernel(x.astype(np.int16), w, padded, y)
        np.testing.assert_array_equal(y[:8], expected)
    if not HAS_BYTE_PRODUCTS:
        return
    y = np.zeros((8, 32), np.float32)
    by_rows(x, w, offsets, scales, y)
    np.testing.assert_array_equal(y[0, :4], expected[0, :4])
    y[:] = 0
    by_tiles(x, w, offsets, scales, y)
    np.testing.assert_array_equal(y, expected)

rng = np.random.default_rng(0)
for size in (64, 192, 4096):
    x, w = (rng.integers(-127, 128, (n, size)).astype(np.int8) for n in (8, 32))
    check(x, w)
    for a, b in ((127, 127), (-127, 127), (127, -127), (-127, -127), (0, 127)):
        check(np.full_like(x, a), np.full_like(w, b))
for k in range(64):  # every lane counts, and once
    w, x = rng.integers(-127, 128, (32, 64)).astype(np.int8), np.zeros((8, 64), np.int8)
    x[np.arange(8), (k + np.arange(8)) % 64] = 1
    check(x, w)
for kernel in (by_rows, by_tiles, by_pairs, by_pair_rows) if HAS_BYTE_PRODUCTS else (by_pairs, by_pair_rows):
    assembly = next(iter(kernel.inspect_asm().values()))
    print(*(name for name in ("vpdpbusd", "pmaddwd") if name in assembly))
"""

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86")


def run(environment: dict[str, str]) -> str:
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | environment
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_sums_are_exact_on_this_processor() -> None:
    features = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()
    has_byte_products = "+avx512vnni" in features
    products = ["vpdpbusd"] * 2 if has_byte_products else []
    found = run({}).splitlines()
    assert found[: len(products)] == products and len(found) == len(products) + 2


@x86
@pytest.mark.parametrize(("name", "features"), [("nehalem", "+sse4.2"), ("haswell", "+avx2,+fma,+f16c")])
def test_sums_are_exact_without_byte_products(name: str, features: str) -> None:
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    assert run(environment).splitlines() == ["pmaddwd"] * 2
