"""Chooses the device that quantizes rows. All devices write the same bytes.

`auto` takes the CPU: hashing, reading and writing set the pace. The row kernel is a tenth of the work
(docs/results/convert.md), less than the start of a device costs. Not yet measured on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from int8convert.checkpoint.rows import Scratch
from int8convert.errors import DeviceError


class Device(NamedTuple):
    """The device that computes: "cpu" or "cuda:n".

    reason: why, if the user did not choose it and another is there.
    """

    name: str
    reason: str | None = None

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


CPU = Device("cpu")

_NVIDIA = Path("/dev/nvidiactl")
"""A file that exists where there are a driver and a GPU that this process may use."""


def check_device_name(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", device):
        raise ValueError(f"device must be auto, cpu or cuda[:n], not {device!r}")


def choose_device(device: str) -> Device:
    """Return the device that converts.

    Raises:
        DeviceError: it cannot be used.
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
            "pass --device cpu: the output is the same",
        )
    return Device(device if ":" in device else f"cuda:{torch.cuda.current_device()}")


def make_scratch(device: Device) -> Scratch:
    """Return a worker's buffers, which quantize on a device.

    Raises:
        DeviceError: the device has no room for them.
    """
    if device.is_cpu:
        return Scratch()
    from int8convert.conversion.gpu import CudaScratch, CudaStream, telling_of

    with telling_of(device.name):
        return CudaScratch(device.name, CudaStream(device.name))
