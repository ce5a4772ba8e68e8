"""What a planned conversion will cost: memory from its parts, arithmetic from a moment's measurement."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cuda_kernels import cpu
from int8convert.conversion.blocks import BLOCK_BYTES, largest_block_bytes
from int8convert.conversion.plan import ConversionPlan, PlannedTensor

BASE_BYTES = 255_000_000
"""Resident set of this process with NumPy, Numba and a compiled kernel and the chunks on their way to the
disk: 251 MB measured on 26 GB, Linux x86-64, Python 3.11."""

MODEL_MAP_BYTES = 360_000_000
"""Resident set of the child that builds the model map, alive for the first seconds: 347 MB measured for OPT-1.3B."""

_PROBE_SHAPE = (256, 4096)


@dataclass(frozen=True, slots=True)
class ConversionCosts:
    """An estimate.

    peak_memory_bytes: resident set of all processes together, without the page cache.
    kernel_s: seconds of arithmetic on `n_workers` threads; a lower bound, reading and writing come on top.
    """

    n_workers: int
    peak_memory_bytes: int
    kernel_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: ConversionPlan, workers: int | None) -> ConversionCosts:
    """Estimate from the plan; runs the kernel for some milliseconds."""
    n_workers = workers or len(os.sched_getaffinity(0))
    largest_block = max(
        (largest_block_bytes(tensor.source) for tensor in plan.tensors if _is_in_rows(tensor)), default=BLOCK_BYTES
    )
    memory = BASE_BYTES + max(MODEL_MAP_BYTES, n_workers * 3 * largest_block)
    int8_bytes = sum(tensor.source.n_bytes for tensor in plan.tensors if tensor.is_quantized)
    return ConversionCosts(n_workers, memory, int8_bytes / _kernel_bytes_per_s() / n_workers)


def _is_in_rows(tensor: PlannedTensor) -> bool:
    """Whether a block of it cannot be cut anywhere."""
    return tensor.is_quantized or tensor.source.strides is not None


def _kernel_bytes_per_s() -> float:
    """Source bytes a second of fp16 on one thread, the best of a few runs."""
    rows, columns = _PROBE_SHAPE
    bits = np.random.default_rng(0).standard_normal(_PROBE_SHAPE).astype(np.float16).view(cpu.BITS_DTYPE["F16"])
    codes = np.empty(_PROBE_SHAPE, np.int8)
    absmax, signal, noise = np.empty(rows, np.float32), np.empty(rows), np.empty(rows)
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        cpu.row_quantize(bits, codes, absmax, signal, noise)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * rows * columns / fastest
