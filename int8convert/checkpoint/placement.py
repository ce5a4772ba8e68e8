"""On how many GPUs a checkpoint runs: its layers in order, each whole on one GPU, as device maps place them.

What it does not know: the key-value cache and the activations, which grow with the text, and what else is on a GPU. It
leaves a fixed reserve for the latter; the room that is left over is for the former.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

GPU_SIZES_GB = (24, 40, 80)
MAX_GPUS = 8
RESERVED_BYTES = 1_000_000_000
"""Of each GPU: the CUDA context, the libraries' workspaces, activations. A round figure, not a measured one."""

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Placement:
    """What a model needs of one size of GPU.

    Attributes:
        gpu_gb: memory of one, in GB of 10^9 bytes.
        n_gpus: the fewest that hold it; None if more than eight would be needed.
        n_free_bytes: on all of them together, reserve deducted.
    """

    gpu_gb: int
    n_gpus: int | None
    n_free_bytes: int


def place(tensors: Iterable[tuple[str, int]]) -> tuple[Placement, ...]:
    """The fewest GPUs of each usual size for tensors, given as name and bytes in the order of the model."""
    groups: dict[str, int] = {}
    for name, n_bytes in tensors:
        layer = _LAYER.match(name)
        key = layer[1] if layer else name
        groups[key] = groups.get(key, 0) + n_bytes
    return tuple(_place(list(groups.values()), gb) for gb in GPU_SIZES_GB)


def _place(groups: list[int], gpu_gb: int) -> Placement:
    room = gpu_gb * 1_000_000_000 - RESERVED_BYTES
    n_gpus, left = 1, room
    for n_bytes in groups:
        if n_bytes > left:
            n_gpus, left = n_gpus + 1, room
        left -= n_bytes
        if left < 0 or n_gpus > MAX_GPUS:
            return Placement(gpu_gb, None, 0)
    return Placement(gpu_gb, n_gpus, n_gpus * room - sum(groups))
