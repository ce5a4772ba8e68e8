"""Estimates the costs of a plan: memory from its parts, time from a short measurement of the kernel."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cuda_kernels import cpu
from int8convert.checkpoint.rows import BLOCK_BYTES, Scratch, largest_block_bytes
from int8convert.conversion.calibrated_rows import rounding_bytes
from int8convert.conversion.destination import Destination
from int8convert.conversion.device import CPU, Device, make_scratch
from int8convert.conversion.disk_budget import DiskBudget
from int8convert.conversion.readers import (
    Reader,
    ReaderCosts,
    choose_reader,
    download_costs,
    is_remote,
    stream_costs,
)
from int8convert.conversion.source_rows import decoded_bytes
from int8convert.hub.download import is_cached
from int8convert.planning.plan import ConversionPlan, PlannedTensor
from int8convert.planning.reading_order import ReadingOrder

BASE_BYTES = 255_000_000
"""Resident set of this process with NumPy, a kernel, Numba if the kernel has to be compiled first, and the chunks on
their way to the disk: 251 MB measured on 26 GB, Linux x86-64, Python 3.11."""

MODEL_MAP_BYTES = 360_000_000
"""Resident set of the child that builds the model map, alive for the first seconds: 347 MB measured for OPT-1.3B."""

_PROBE_SHAPE = (256, 4096)


@dataclass(frozen=True, slots=True)
class ConversionCosts:
    """An estimate of memory and time.

    Attributes:
        peak_memory_bytes: resident set of all processes together, without the page cache.
        work_memory_bytes: the same after transformers has mapped the model, which takes the first seconds. Equal where
            the map was known.
        kernel_s: seconds of arithmetic on `n_workers` threads, and of copies to and from a CUDA device. A lower bound:
            reading and writing come on top.
    """

    n_workers: int
    peak_memory_bytes: int
    kernel_s: float
    device: str
    work_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(plan: ConversionPlan, workers: int | None, device: Device = CPU) -> ConversionCosts:
    """Estimate memory and time. Runs the kernel for some milliseconds, on a CUDA device after seconds of set-up."""
    n_workers = workers or len(os.sched_getaffinity(0))
    bytes_per_s = _kernel_bytes_per_s(make_scratch(device))
    base_bytes = BASE_BYTES if device.is_cpu else max(BASE_BYTES, _resident_bytes())
    largest_block = max((_block_bytes(tensor) for tensor in plan.tensors if _is_in_rows(tensor)), default=BLOCK_BYTES)
    block_bytes = n_workers * 3 * largest_block + rounding_bytes(plan)
    work_bytes = base_bytes + block_bytes
    peak_bytes = max(work_bytes, base_bytes + MODEL_MAP_BYTES) if plan.took_child else work_bytes
    int8_bytes = sum(
        2 * tensor.n_elements if tensor.coding else tensor.source.n_bytes
        for tensor in plan.tensors
        if tensor.is_quantized
    )
    return ConversionCosts(n_workers, peak_bytes, int8_bytes / bytes_per_s / n_workers, device.name, work_bytes)


def estimate_disk(plan: ConversionPlan, out: Path, destination: Destination) -> DiskBudget:
    """Estimate the disk for a conversion from its beginning.

    Args:
        destination: nothing is asked of its publisher.

    Raises:
        DiskFullError: shards are too large for the bound that is set.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    return destination.budget(plan, (), shutil.disk_usage(existing).free)


@dataclass(frozen=True, slots=True)
class FetchCosts:
    """The costs of reading the weights from the Hub.

    Attributes:
        stream, download: costs of the two readers.
        bytes_per_s: rate of the network, as the user says; None if it is unknown.
        reader, reason: the reader that would be used, and why; the reason is "" if the user asked for it.
    """

    n_bytes: int
    stream: ReaderCosts
    download: ReaderCosts
    bytes_per_s: int | None
    reader: Reader
    reason: str

    @property
    def seconds(self) -> float | None:
        return self.n_bytes / self.bytes_per_s if self.bytes_per_s else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds}


def estimate_fetch(
    plan: ConversionPlan,
    n_workers: int,
    cache_dir: Path | None,
    bytes_per_s: int | None,
    asked: Reader,
    n_spare_bytes: int,
) -> FetchCosts | None:
    """Estimate the costs of reading a plan's source from the Hub; None for a local source.

    Args:
        asked: the reader that the user asked for.
        n_spare_bytes: bytes of disk that the output leaves free.
    """
    if not is_remote(plan.source):
        return None
    order = ReadingOrder(plan)
    n_bytes = sum(shard.n_bytes for shard in order.shards if not is_cached(shard, cache_dir))
    stream, download = stream_costs(order, n_workers), download_costs(order, cache_dir)
    choice = choose_reader(asked, order, n_workers, cache_dir, n_spare_bytes)
    return FetchCosts(n_bytes, stream, download, bytes_per_s, choice.reader, choice.reason)


def _resident_bytes() -> int:
    """Return the resident set of this process now. Torch and the driver map more on some machines than on others."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_in_rows(tensor: PlannedTensor) -> bool:
    """Return whether blocks of a tensor must be whole rows."""
    return tensor.is_quantized or tensor.coding is not None or tensor.source.strides is not None


def _block_bytes(tensor: PlannedTensor) -> int:
    """Return the bytes of the largest block of a tensor, as it is stored or as the floats that its codes stand for."""
    stored_bytes = largest_block_bytes(tensor.source)
    if tensor.coding is None:
        return stored_bytes
    return max(stored_bytes, decoded_bytes(tensor.source), 4 * prod(tensor.shape[1:]))


def _kernel_bytes_per_s(scratch: Scratch) -> float:
    """Return the fp16 bytes that one thread quantizes in a second: the best of five runs."""
    rows, columns = _PROBE_SHAPE
    bits = scratch.source(2 * rows * columns).view(cpu.BITS_DTYPE["F16"]).reshape(_PROBE_SHAPE)
    bits[:] = np.random.default_rng(0).standard_normal(_PROBE_SHAPE).astype(np.float16).view(bits.dtype)
    codes = scratch.codes(bits.size).reshape(_PROBE_SHAPE)
    absmax, signal, noise = np.empty(rows, np.float32), np.empty(rows), np.empty(rows)
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        scratch.row_quantize(bits, codes, absmax, signal, noise)
        fastest = min(fastest, time.perf_counter() - began)
    return bits.nbytes / fastest
