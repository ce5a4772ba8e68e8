"""Maxima and sums over a warp or a block, always in the same order: two launches give the same bits.

They are inlined into the kernel, and every thread gets the result. A block is a whole number of warps, up to 1024
threads, and all of its threads must take part.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda.ptx.scalars import shuffle_xor


@cuda.jit(device=True, inline="always")
def warp_max(value):  # type: ignore[no-untyped-def]
    """The largest of 32 values: uint32, int32, or float32 without NaN."""
    for lanes in (16, 8, 4, 2, 1):
        value = max(value, shuffle_xor(value, lanes))
    return value


@cuda.jit(device=True, inline="always")
def warp_sum(value):  # type: ignore[no-untyped-def]
    """The sum of 32 float32, as a balanced tree; equal on all lanes, for a + b is b + a."""
    for lanes in (16, 8, 4, 2, 1):
        value += shuffle_xor(value, lanes)
    return value


@cuda.jit(device=True, inline="always")
def block_max(value, scratch):  # type: ignore[no-untyped-def]
    """The largest value of a block. `scratch` is a shared array, one element a warp, for this reduction alone.

    A second reduction needs a second array, or a barrier before it.
    """
    value = warp_max(value)
    thread = types.uint32(cuda.threadIdx.x)
    if thread & types.uint32(31) == types.uint32(0):
        scratch[thread >> types.uint32(5)] = value
    cuda.syncthreads()
    for warp in range(scratch.size):
        value = max(value, scratch[warp])
    return value


@cuda.jit(device=True, inline="always")
def block_sum(value, scratch):  # type: ignore[no-untyped-def]
    """The sum of a block's float32, the warps' sums added in their order. `scratch` as in `block_max`."""
    value = warp_sum(value)
    thread = types.uint32(cuda.threadIdx.x)
    if thread & types.uint32(31) == types.uint32(0):
        scratch[thread >> types.uint32(5)] = value
    cuda.syncthreads()
    value = scratch[0]
    for warp in range(1, scratch.size):
        value += scratch[warp]
    return value
