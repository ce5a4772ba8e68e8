"""Weight rows to int8 codes, their absmax and the rounding error; see `reference.row_quantize`.

A row is read twice, the second time from the core's own cache. The first pass finds the largest bit pattern with the
sign cleared. The second scales, rounds and sums the error.

Cost: 2 bytes read and 1 written per 16-bit weight. Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.bits import magnitude, widen
from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.reference import N_STEPS


# `reassoc` lets the two sums use whole vector registers. It stays out of the caller below, where LLVM would turn
# (1 / absmax) * 127 into 127 / absmax and move codes by one.
@compiled(fastmath={"reassoc"})
def _quantize_one_row(row, inv_scale, codes):  # type: ignore[no-untyped-def]
    signal = np.float32(0)
    noise = np.float32(0)
    for k in range(row.size):
        in_steps = widen(row[k]) * inv_scale
        code = np.rint(in_steps)
        codes[k] = np.int8(code)
        signal += in_steps * in_steps
        noise += (in_steps - code) * (in_steps - code)
    return signal, noise


@compiled()
def row_quantize(bits, codes, absmax, signal, noise):  # type: ignore[no-untyped-def]
    for r in range(bits.shape[0]):
        row = bits[r]
        largest = magnitude(bits.dtype.type(0))
        for k in range(row.size):
            largest = max(largest, magnitude(row[k]))
        absmax[r] = widen(largest)
        inv_scale = (np.float32(1) / absmax[r]) * np.float32(N_STEPS)
        if not np.isfinite(inv_scale):
            inv_scale = np.float32(0)
        signal[r], noise[r] = _quantize_one_row(row, inv_scale, codes[r])
