"""Memory of this process: what is available, what was used, and what a comparison layer by layer will take."""

from __future__ import annotations

import os
import re
import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.runtime.models import read_config
from int8convert.runtime.pretrained import model_class
from int8convert.sources import open_source
from int8convert.verification.fidelity.comparison import FidelityTask
from int8convert.verification.fidelity.paired_statistics import BLOCK_ELEMENTS

_CGROUP = Path("/sys/fs/cgroup")

USABLE = 0.9
"""Share of the available memory that a measurement may plan for."""

LOGITS_AT_A_TIME = 1 << 24
"""Elements of the logits that are computed at a time when streamed: 64 MiB in float32."""

_STATES_SHARE = 0.25
"""Share of the available memory that hidden states may take; larger ones go into files."""

_LAYER = re.compile(r"(?:.*?\.)??(\d+)\.")


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


_CODE_BYTES = 200_000_000
"""Bytes for imports, compilation and the allocator in the first measurement: 134 MB measured on Linux x86-64, Python
3.11, torch 2.13, transformers 5.23."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """A comparison layer by layer.

    Attributes:
        peak_bytes: the most memory that will be resident in this process.
        n_layers: decoder layers of the model.
        states_in_files: whether hidden states go into files.
    """

    peak_bytes: int
    n_layers: int
    states_in_files: bool


def bytes_in_memory(task: FidelityTask) -> int:
    """Return the memory for both models and one window."""
    text = read_config(task.reference, task.trusts_code).get_text_config()
    window = 4 * task.windows.ids.shape[1] * (text.num_hidden_layers * text.hidden_size + 2 * text.vocab_size)
    models = sum(_reference_bytes(tensor, task.device) for tensor in open_source(task.reference).tensors)
    models += sum(tensor.n_bytes for tensor in open_source(task.out).tensors)
    return models + int(window) + _working_bytes(task)


def plan_stream(task: FidelityTask) -> StreamPlan:
    """Plan the memory of a comparison layer by layer, from names and shapes."""
    config = read_config(task.reference, task.trusts_code).get_text_config()
    states = 4 * (1 + task.n_arithmetics) * task.windows.ids.numel() * config.hidden_size
    in_files = states > _STATES_SHARE * available_bytes("cpu")
    rest, layers = 0, [0]
    for path, is_reference in ((task.reference, True), (task.out, False)):
        held: Counter[int] = Counter()
        for tensor in open_source(path).tensors:
            layer = _LAYER.match(tensor.name)
            n_bytes = _reference_bytes(tensor, task.device) if is_reference else tensor.n_bytes
            if layer is None:
                rest += n_bytes
            else:
                # Tensors before the change of dtype, or before they are joined, come on top.
                held[int(layer[1])] += n_bytes + max(tensor.n_bytes, n_bytes if _is_of_expert(tensor.name) else 0)
        layers += held.values()
    peak = resident_bytes() + rest + max(layers) + _working_bytes(task) + (0 if in_files else states)
    return StreamPlan(peak, int(config.num_hidden_layers), in_files)


def _is_of_expert(name: str) -> bool:
    return len(re.findall(r"\.\d+(?=\.)", f".{name}")) > 1


def _reference_bytes(tensor: StoredTensor, device: str) -> int:
    """Return the memory of a tensor of the reference, which is float32 on the CPU."""
    is_float = tensor.dtype.startswith(("F", "BF"))
    return tensor.n_elements * (4 if is_float and device == "cpu" else DTYPE_BYTES[tensor.dtype])


def _working_bytes(task: FidelityTask) -> int:
    """Return the memory of one window inside one layer, and of one block of logits with its statistics.

    A layer holds inputs, inner features and a mask, and all attention scores if the model has no SDPA.
    """
    whole = read_config(task.reference, task.trusts_code)
    config = whole.get_text_config()
    length = task.windows.ids.shape[1]
    n_score_tables = 2 if getattr(model_class(whole), "_supports_sdpa", False) else 3 * config.num_attention_heads
    layer = 4 * length * (32 * int(config.hidden_size) + length * int(n_score_tables))
    n_logits = length * int(config.vocab_size)
    return layer + 6 * 8 * min(BLOCK_ELEMENTS, n_logits) + 4 * 4 * min(LOGITS_AT_A_TIME, n_logits) + _CODE_BYTES
