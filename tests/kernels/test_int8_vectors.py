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
from cuda_kernels.cpu.kernels.int8_tiles import add_scaled_tile, add_to_tile, pack_codes, start_tile
from cuda_kernels.cpu.kernels.int8_vectors import add_products, add_scaled_totals
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

def check(x, w):
    offsets = 128 * x.astype(np.int32).sum(1, dtype=np.int32)
    scales = 2 ** np.arange(8, dtype=np.float32)
    expected = (x.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32) * scales[:, None]
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
for kernel in (by_rows, by_tiles):
    assembly = next(iter(kernel.inspect_asm().values()))
    print(*(name for name in ("vpdpbusd", "pmaddwd") if name in assembly))
"""

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86")


def run(environment: dict[str, str]) -> str:
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | environment
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_sums_are_exact_on_this_processor() -> None:
    has_byte_products = bool(llvm.get_host_cpu_features().get("avx512vnni"))
    assert run({}).splitlines() == ["vpdpbusd"] * 2 if has_byte_products else "vpdpbusd" not in run({})


@x86
def test_sums_are_exact_without_byte_products() -> None:
    assert run({"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"}).splitlines() == ["pmaddwd"] * 2
