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
from cuda_kernels.cpu.int8_vectors import add_products, load_codes, load_offset_codes, total, zero_sums

@njit
def multiply(x, w):
    sums = zero_sums()
    for k in range(0, x.size, 64):
        sums = add_products(sums, load_offset_codes(w.ctypes.data, k), load_codes(x.ctypes.data, k))
    return total(sums)

rng = np.random.default_rng(0)
for size in (64, 192, 4096):
    x, w = rng.integers(-127, 128, (2, size)).astype(np.int8)
    extreme = np.full(size, 127, np.int8)
    for a, b in ((x, w), (extreme, extreme), (-extreme, extreme), (x, -extreme), (extreme * 0, w)):
        a, b = a.astype(np.int64), b.astype(np.int64)
        assert multiply(a.astype(np.int8), b.astype(np.int8)) == ((b + 128) * a).sum(), (size, a, b)
    for k in range(size):  # every lane counts, and once
        one = np.zeros(size, np.int8)
        one[k] = 1
        assert multiply(one, w) == int(w[k]) + 128
print(next(iter(multiply.inspect_asm().values())))
"""

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86")


def run(environment: dict[str, str]) -> str:
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | environment
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_sums_are_exact_on_this_processor() -> None:
    has_byte_products = bool(llvm.get_host_cpu_features().get("avx512vnni"))
    assert ("vpdpbusd" in run({})) == has_byte_products


@x86
def test_sums_are_exact_without_byte_products() -> None:
    assembly = run({"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"})
    assert "pmaddwd" in assembly and "vpdpbusd" not in assembly
