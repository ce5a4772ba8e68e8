"""Chooses the device a model runs on, and checks that torch has it."""

from __future__ import annotations

import re

import torch

from int8convert.errors import DeviceError


def choose_device(device: str) -> str:
    """Return "cpu" or "cuda[:n]".

    Args:
        device: "auto", which is the GPU if there is one, "cpu" or "cuda[:n]".

    Raises:
        DeviceError: torch has no such device here.
        ValueError: it is not the name of a device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(:(\d+))?", device)
    if match is None:
        raise ValueError(f"device must be auto, cpu or cuda[:n], not {device!r}")
    n_gpus = torch.cuda.device_count()
    if device != "cpu" and int(match[2] or 0) >= n_gpus:
        found = f"torch finds {n_gpus} here" if n_gpus else "torch finds no usable GPU here"
        raise DeviceError(f"--device {device}: {found}", "pass --device cpu, or leave it out")
    return device
