"""Kernels that Numba-CUDA compiles, for every architecture, against NumPy."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.ptx import Memory, execute

cuda = pytest.importorskip("numba.cuda")
types = cuda.types
Capability = tuple[int, int]
CAPABILITIES = [(7, 5), (8, 0), (9, 0), (10, 0)]
F32 = types.CPointer(types.float32)
I32 = types.CPointer(types.int32)


@cache
def compiled(kernel: object, signature: object, cc: Capability) -> str:
    text, _ = cuda.compile(kernel, signature, device=False, abi="numba", cc=cc, output="ptx")
    return str(text)


def reverse_blocks(x, out, n):  # type: ignore[no-untyped-def]
    """Each block of 96 threads reverses its part of x through shared memory."""
    tile = cuda.shared.array(96, types.float32)
    i = np.uint32(cuda.blockIdx.x) * np.uint32(96) + np.uint32(cuda.threadIdx.x)
    if i < n:
        tile[cuda.threadIdx.x] = x[i] * np.float32(2)
    else:
        tile[cuda.threadIdx.x] = np.float32(0)
    cuda.syncthreads()
    mirrored = np.uint32(95) - np.uint32(cuda.threadIdx.x)
    if i < n:
        out[i] = tile[mirrored]


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_shared_memory_reverses_a_block(cc: Capability) -> None:
    text = compiled(reverse_blocks, types.void(F32, F32, types.uint32), cc)
    n = 1000
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    out = np.full(n, np.nan, np.float32)
    memory = Memory()
    trace = execute(text, 11, 96, [memory.place(x), memory.place(out), n], memory)
    padded = np.append(2 * x, np.zeros(11 * 96 - n, np.float32))
    np.testing.assert_array_equal(out, padded.reshape(11, 96)[:, ::-1].reshape(-1)[:n])
    assert trace.executed["bar.sync"] == 11 * 96
    assert trace.stored_bytes["global"] == 4 * n
