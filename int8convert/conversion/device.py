"""Which device quantizes rows. The bytes written are the same on all.

`auto` takes the CPU: hashing, reading and writing set the pace, and the row kernel is a tenth of the work
(docs/results/convert.md), less than it costs to start up a device. Not yet measured on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from int8convert.checkpoint.rows import Scratch
from int8convert.errors import DeviceError


class Device(NamedTuple):
    """Where conversion computes: "cpu" or "cuda:n"; and why, if it was not asked for and might be another."""

    name: str
    reason: str | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


CPU = Device("cpu")

_NVIDIA = Path("/dev/nvidiactl")
"""There where a driver is, and a GPU that this process may use."""


def check_device_name(device: str) -> None:
    """Refuse what no machine has.

    Raises:
        ValueError: it is not auto, cpu or cuda[:n].
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", device):
        raise ValueError(f"device must be auto, cpu or cuda[:n], not {device!r}")


def choose_device(device: str) -> Device:
    """The device that converts.

    Raises:
        ValueError: it is not auto, cpu or cuda[:n].
        DeviceError: it is not to be had, and why.
    """
    check_device_name(device)
    if device == "cpu":
        return CPU
    if device == "auto":
        pace = "hashing, reading and writing set the pace, which a GPU would not change"
        return Device("cpu", pace) if _NVIDIA.exists() else CPU
    import torch

    from cuda_kernels.cuda.launch import unavailable

    reason = unavailable(torch.device(device))
    if reason is not None:
        raise DeviceError(
            f"--device {device} cannot be used: {reason}",
            "pass --device cpu or leave the option out: the output is the same",
        )
    return Device(device if ":" in device else f"cuda:{torch.cuda.current_device()}")


def make_scratch(device: Device) -> Scratch:
    """A worker's buffers, which know where they quantize.

    Raises:
        DeviceError: the device has no room for them.
    """
    if device.is_cpu:
        return Scratch()
    from int8convert.conversion.gpu import CudaScratch, CudaStream, telling_of

    with telling_of(device.name):
        return CudaScratch(device.name, CudaStream(device.name))
