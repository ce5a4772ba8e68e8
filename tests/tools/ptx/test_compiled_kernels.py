"""Kernels that Numba-CUDA compiles, for every architecture, against NumPy."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from tests.tools.ptx import Memory, PtxError, execute
from tests.tools.ptx.toolchain import Capability, assemble

cuda = pytest.importorskip("numba.cuda")
types = cuda.types
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


def local_slow_path(x, out, n):  # type: ignore[no-untyped-def]
    """sin of large arguments goes through local memory, pow through a device function."""
    i = cuda.threadIdx.x
    if i < n:
        out[i] = math.sin(x[i]) + math.pow(x[i], 1.25)


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_device_functions_of_the_math_library_are_executed(cc: Capability) -> None:
    f64 = types.CPointer(types.float64)
    text = compiled(local_slow_path, types.void(f64, f64, types.int32), cc)
    x = np.array([0.1, 1.0, 2.5, 1e3, 1e7, 3e9, 1e15, 7.25e21] * 4)
    out = np.zeros_like(x)
    memory = Memory()
    execute(text, 1, 32, [memory.place(x), memory.place(out), len(x)], memory)
    np.testing.assert_allclose(out, [math.sin(each) + math.pow(each, 1.25) for each in x], rtol=1e-15)


def count_above(x, count, n):  # type: ignore[no-untyped-def]
    """How many of x exceed 1/2: by warp votes, shared and global atomics, and a loop over the grid."""
    total = cuda.shared.array(1, types.int32)
    if cuda.threadIdx.x == 0:
        total[0] = 0
    cuda.syncthreads()
    i = cuda.grid(1)
    while i - cuda.laneid < n:
        above = i < n and x[min(i, n - 1)] > np.float32(0.5)
        votes = cuda.ballot_sync(0xFFFFFFFF, above)
        if cuda.laneid == 0:
            cuda.atomic.add(total, 0, cuda.popc(votes))
        i += cuda.gridsize(1)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(count, 0, total[0])


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_votes_and_atomics_count(cc: Capability) -> None:
    signature = types.void(F32, types.int32[::1], types.int32)
    text = compiled(count_above, signature, cc)
    x = np.random.default_rng(3).random(1001).astype(np.float32)
    count, memory = np.zeros(1, np.int32), Memory()
    array = [0, 0, 1, 4, memory.place(count), 1, 4]
    execute(text, 3, 96, [memory.place(x), *array, len(x)], memory)
    assert count[0] == (x > 0.5).sum()


def sum_without_barrier(x, out):  # type: ignore[no-untyped-def]
    """A sum over a block whose author forgot the barrier between the steps."""
    tile = cuda.shared.array(128, types.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    step = 64
    while step > 0:
        cuda.syncthreads()
        if i < step:
            tile[i] += tile[i + step]
        step //= 2
    if i == 1:
        out[0] = tile[0]


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_forgotten_barrier_is_found_in_what_numba_emits(cc: Capability) -> None:
    text = compiled(sum_without_barrier, types.void(F32, F32), cc)
    x, out, memory = np.ones(128, np.float32), np.zeros(1, np.float32), Memory()
    with pytest.raises(PtxError, match="races with"):
        execute(text, 1, 128, [memory.place(x), memory.place(out)], memory)


def four_sums(x, out, rows):  # type: ignore[no-untyped-def]
    """A local array indexed at run time: it cannot stay in registers."""
    sums = cuda.local.array(16, types.float32)
    i = cuda.threadIdx.x
    for k in range(16):
        sums[k] = np.float32(0)
    for row in range(rows):
        sums[(row * i) & 15] += x[row]
    out[i] = sums[i & 15]


@pytest.mark.parametrize("cc", [*CAPABILITIES, (9, 0, "a")])
def test_assembler_reports_resources_and_machine_code(cc: Capability) -> None:
    cubin = assemble(compiled(reverse_blocks, types.void(F32, F32, types.uint32), cc[:2]), cc)
    assert 8 <= cubin.registers <= 32
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    # From 9.0 on ptxas keeps a kilobyte of every block for itself; it does not count it here.
    assert cubin.shared_bytes == 4 * 96
    assert any(each.startswith("BAR.SYNC") for each in cubin.opcodes())
    assert any(each.startswith("STS") for each in cubin.opcodes())
    assert not any(each.startswith(("LDL", "STL")) for each in cubin.opcodes())
    local = assemble(compiled(four_sums, types.void(F32, F32, types.int32), cc[:2]), cc)
    assert local.stack_bytes >= 64
    assert any(each.startswith("STL") for each in local.opcodes())


def test_assembler_says_why_it_refuses() -> None:
    text = compiled(reverse_blocks, types.void(F32, F32, types.uint32), (9, 0))
    with pytest.raises(RuntimeError, match="ptxas"):
        assemble(text, (8, 0))


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_local_array_is_executed(cc: Capability) -> None:
    text = compiled(four_sums, types.void(F32, F32, types.int32), cc)
    x, out, memory = np.arange(40, dtype=np.float32), np.zeros(32, np.float32), Memory()
    execute(text, 1, 32, [memory.place(x), memory.place(out), 40], memory)
    expected = [sum(x[row] for row in range(40) if (row * i) & 15 == i & 15) for i in range(32)]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("blocks_at_once", [1, 3, None])
def test_result_does_not_depend_on_how_many_blocks_run_together(blocks_at_once: int | None) -> None:
    text = compiled(reverse_blocks, types.void(F32, F32, types.uint32), (8, 0))
    x = np.random.default_rng(0).standard_normal(960).astype(np.float32)
    out, memory = np.zeros_like(x), Memory()
    trace = execute(text, 10, 96, [memory.place(x), memory.place(out), 960], memory, blocks_at_once=blocks_at_once)
    np.testing.assert_array_equal(out.reshape(10, 96), 2 * x.reshape(10, 96)[:, ::-1])
    assert trace.executed["bar.sync"] == 960
