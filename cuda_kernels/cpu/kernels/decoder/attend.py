"""Attention of one query for each sequence: softmax(q @ K.T * scale) @ V, in float32, rounded once.

    y[b, h, d] = fl16(sum_s p[s] * v[b, h // group, s, d] / sum_s p[s]),  p[s] = exp(score[s] - max score)
    score[s] = scale * sum_d q[b, h, d] * k[b, h // group, s, d]

Query heads share the keys and values of their group, which are read in place: no copy is made for each head.

Cost: the keys and values of a sequence, read once for each query head, from the core's own cache after the first.
Threads share the heads. The bits depend neither on the batch nor on the threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cuda_kernels.cpu.kernels.bits import narrow, widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.decoder.elementary import exponential
from cuda_kernels.cpu.kernels.float_linear import dot
from cuda_kernels.cpu.kernels.float_vectors import add, fill, load_widened, multiply, store_floats
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import N_FLOATS, NO_MEMORY
from cuda_kernels.cpu.kernels.team import part_of, run_parts

_MIN_ELEMENTS = 1 << 15
"""Products that pay for a thread, about 10 us."""


class Heads(NamedTuple):
    """Sizes of an attention.

    Attributes:
        n_sequences, n_heads, n_groups, head_size: B, H, the number of heads of keys and values, and D.
        n_positions: S.
    """

    n_sequences: int
    n_heads: int
    n_groups: int
    head_size: int
    n_positions: int


class Stored(NamedTuple):
    """Where keys or values are: 16-bit [B, groups, S, D] at `address`, with bytes between entries; rows contiguous."""

    address: int
    sequence_stride: int
    group_stride: int
    position_stride: int


class Allowed(NamedTuple):
    """Which positions are attended to: a byte for each at `address`, or all if it is 0.

    Attributes:
        sequence_stride: bytes from one sequence's to the next one's.
    """

    address: int
    sequence_stride: int


@compiled()
def _attend_heads(heads, q, keys, values, allowed, scale, y, memory, part_bytes, part, n_parts):  # type: ignore[no-untyped-def]
    size, n_positions = heads.head_size, heads.n_positions
    at = memory + part * part_bytes
    wide = view(at, (size,), np.float32(0))
    p = view(at + aligned(4 * size), (n_positions,), np.float32(0))
    sums = view(at + aligned(4 * size) + aligned(4 * n_positions), (N_FLOATS,), np.float32(0))
    begin, end = part_of(heads.n_sequences * heads.n_heads, 1, part, n_parts)
    for head in range(begin, end):
        b, group = head // heads.n_heads, head % heads.n_heads // (heads.n_heads // heads.n_groups)
        k = keys.address + b * keys.sequence_stride + group * keys.group_stride
        v = values.address + b * values.sequence_stride + group * values.group_stride
        for d in range(size):
            wide[d] = widen(q[head * size + d])
        largest = np.float32(-np.inf)
        mask = view(allowed.address + b * allowed.sequence_stride, (n_positions if allowed.address else 0,), np.int8(0))
        for s in range(n_positions):
            p[s] = dot(k + s * keys.position_stride, wide.ctypes.data, size, q[0]) * scale
        for s in range(mask.size):
            if mask[s] == 0:
                p[s] = -np.float32(np.inf)
        for s in range(n_positions):
            largest = max(largest, p[s])
        if largest == -np.float32(np.inf):  # nothing to attend to, which is 0 in torch
            for d in range(size):
                y[head * size + d] = 0
            continue
        for s in range(n_positions):
            p[s] = exponential(p[s] - largest)
        total = np.float32(0)
        for s in range(n_positions):
            total += p[s]
        for d in range(0, size, N_FLOATS):
            n = min(N_FLOATS, size - d)
            if n == N_FLOATS:
                _add_values(v + 2 * d, values.position_stride, p, sums, q[0])
            else:
                sums[:] = 0
                for s in range(n_positions):
                    row = view(v + 2 * d + s * values.position_stride, (n,), q[0])
                    for i in range(n):
                        sums[i] += p[s] * widen(row[i])
            for i in range(n):
                y[head * size + d + i] = narrow(sums[i] / total, y[0])


@compiled()
def _add_values(v, stride, p, sums, like):  # type: ignore[no-untyped-def]
    """Write the sum of rows of 32 values, each times its p. The rows begin at address `v`, `stride` bytes apart."""
    even, odd = fill(np.float32(0)), fill(np.float32(0))
    n_even = p.size // 2 * 2
    for s in range(0, n_even, 2):
        even = add(even, multiply(fill(p[s]), load_widened(v + s * stride, like)))
        odd = add(odd, multiply(fill(p[s + 1]), load_widened(v + (s + 1) * stride, like)))
    for s in range(n_even, p.size):
        even = add(even, multiply(fill(p[s]), load_widened(v + s * stride, like)))
    store_floats(add(even, odd), sums.ctypes.data)


@compiled()
def attend(heads, q, keys, values, allowed, scale, y, team):  # type: ignore[no-untyped-def]
    """Write `y`; return 0, or NO_MEMORY.

    Args:
        heads: `Heads`.
        q, y: bits [B, H, D], flat.
        keys, values, allowed: `Stored`, `Stored` and `Allowed`.
    """
    n_heads = heads.n_sequences * heads.n_heads
    n_products = n_heads * heads.n_positions * heads.head_size
    n_parts = min(n_products // _MIN_ELEMENTS + 1, n_heads, team[3])
    part_bytes = aligned(4 * heads.head_size) + aligned(4 * heads.n_positions) + 4 * N_FLOATS
    memory = allocate(n_parts * part_bytes)
    if memory == 0:
        return NO_MEMORY
    run_parts(_attend_heads, (heads, q, keys, values, allowed, scale, y, aligned(memory), part_bytes), n_parts, team)
    release(memory)
    return 0
