"""Memory of this process: what is available, what was used, and what a model in floating point takes."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor

_CGROUP = Path("/sys/fs/cgroup")

USABLE = 0.9
"""Share of the available memory that a measurement may plan for."""


def available_bytes(device: str) -> int:
    """Return the memory this process may still take on a device: the least of system, container and limits."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    candidates = [_available_on_machine(), _available_in_container()]
    sizes = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}
    for limit, used in sizes.items():
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY:
            candidates.append(allowed - _read_kilobytes(Path("/proc/self/status")).get(used, 0))
    return max(0, min(amount for amount in candidates if amount is not None))


def resident_bytes() -> int:
    return _read_kilobytes(Path("/proc/self/status")).get("VmRSS", 0)


def start_peak() -> None:
    """Reset `peak_bytes`; if the system cannot, it counts from the start of the process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the most memory that was resident since `start_peak`, mapped files included."""
    since = _read_kilobytes(Path("/proc/self/status")).get("VmHWM")
    return since if since is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available_on_machine() -> int:
    found = _read_kilobytes(Path("/proc/meminfo")).get("MemAvailable")
    return found if found is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_in_container() -> int | None:
    """Return what control groups of version 2 allow; pages of files count as available, as they can be dropped."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used.get("anon", 0))


def _read_kilobytes(path: Path) -> dict[str, int]:
    """Return the sizes in a file of /proc, in bytes; {} if there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(amount) * 1024 for name, amount, _ in fields}


def float_bytes(tensor: StoredTensor, device: str) -> int:
    """Return the memory of a tensor in a model that `models.load_model` loads. Floats are float32 on the CPU."""
    is_float = tensor.dtype.startswith(("F", "BF"))
    return tensor.n_elements * (4 if is_float and device == "cpu" else DTYPE_BYTES[tensor.dtype])
