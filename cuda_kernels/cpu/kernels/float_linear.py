"""A Linear layer of 16-bit floats for few tokens, such as the head of a model: y = x @ W.T + bias.

    y[t, n] = fl16(sum_k w[n, k] * x[t, k] + bias[n])

Sums are in float32, in 64 partial sums by k modulo 64, each in ascending order; their halves are added until one is
left, then the columns from the last multiple of 64 on. No multiplication is fused with an addition. So the bits depend
neither on the batch nor on the threads; torch adds in another order.

Cost: N * K * 2 bytes read once. Threads share the rows.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.bits import narrow, widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.float_vectors import add, fill, load_floats, load_widened, multiply, total
from cuda_kernels.cpu.kernels.memory import aligned, allocate, release, view
from cuda_kernels.cpu.kernels.sizes import N_FLOATS, NO_MEMORY
from cuda_kernels.cpu.kernels.team import part_of, run_parts

_MIN_ELEMENTS = 1 << 17
"""Elements of the weight that pay for a thread, about 10 us."""

_STEP = 2 * N_FLOATS


@compiled()
def dot(w, x, n, like):  # type: ignore[no-untyped-def]
    """Return the sum of products of a row of 16 bits with float32, both at addresses, over n columns."""
    first, second = fill(np.float32(0)), fill(np.float32(0))
    n_whole = n // _STEP * _STEP
    for k in range(0, n_whole, _STEP):
        first = add(first, multiply(load_widened(w + 2 * k, like), load_floats(x + 4 * k)))
        second = add(
            second, multiply(load_widened(w + 2 * k + 2 * N_FLOATS, like), load_floats(x + 4 * k + 4 * N_FLOATS))
        )
    value = total(add(first, second))
    rest_w, rest_x = view(w + 2 * n_whole, (n - n_whole,), like), view(x + 4 * n_whole, (n - n_whole,), np.float32(0))
    for k in range(rest_w.size):
        value += widen(rest_w[k]) * rest_x[k]
    return value


@compiled()
def _multiply(sizes, x, weight, bias, y, part, n_parts):  # type: ignore[no-untyped-def]
    n_tokens, n_rows, n_columns = sizes
    begin, end = part_of(n_rows, 1, part, n_parts)
    for n in range(begin, end):
        for t in range(n_tokens):
            value = dot(weight + 2 * n * n_columns, x + 4 * t * n_columns, n_columns, y[0])
            if bias.size:
                value += widen(bias[n])
            y[t * n_rows + n] = narrow(value, y[0])


@compiled()
def float_linear(sizes, x, weight, bias, y, team, like):  # type: ignore[no-untyped-def]
    """Write `y`, [M, N]; return 0, or NO_MEMORY.

    Args:
        sizes: M, N and K.
        x, weight, bias, y: addresses of the bits of contiguous arrays; 0 for no bias.
        like: any value of the type of the bits, of 16.
    """
    n_tokens, n_rows, n_columns = sizes
    memory = allocate(4 * n_tokens * n_columns)
    if memory == 0:
        return NO_MEMORY
    bits, wide = view(x, (n_tokens * n_columns,), like), view(aligned(memory), (n_tokens * n_columns,), np.float32(0))
    for k in range(bits.size):
        wide[k] = widen(bits[k])
    biases, outputs = view(bias, (n_rows if bias else 0,), like), view(y, (n_tokens * n_rows,), like)
    args = (sizes, aligned(memory), weight, biases, outputs)
    run_parts(_multiply, args, min(n_rows * n_columns // _MIN_ELEMENTS + 1, team[3]), team)
    release(memory)
    return 0
