"""Launches through the real cuda.bindings, into a driver of our own: tests/kernels/stub_driver.c."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SCRIPT = """
import types, torch
torch.cuda.init = lambda: None
torch.cuda.get_device_capability = lambda index: (9, 9)
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0x55)
from cuda_kernels.cuda import launch
from tests.kernels.test_launch import kernel
device, one = torch.device("cuda:1"), kernel()
one._compile = lambda cc: f".visible .entry e{cc[0]}{cc[1]}()"
first = launch.Launch(one, (2, 3, 4), 0, (1 << 40, 1 << 31, -5))
launch.run([first, launch.Launch(one, (5, 1, 1), 70000, (7, 8, 9))], device)
print("shared", launch.most_shared_bytes(device))
try:
    launch.run([launch.Launch(one, (77, 1, 1), 0, (0, 0, 0))], device)
except launch.CudaError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_what_reaches_the_driver(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.driver")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    stub = Path(__file__).with_name("stub_driver.c")
    subprocess.run([compiler, "-shared", "-fPIC", str(stub), "-o", str(tmp_path / "libcuda.so.1"), "-ldl"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "push 0x1001",
        "load 21",
        "get 0x2000 e90",  # the newest architecture that the toolkit knows and the device understands
        "launch 0x3000 2 3 4 128 1 1 0 0x55 (nil) 1099511627776 2147483648 -5",
        "attribute 0x3000 8 70000",
        "launch 0x3000 5 1 1 128 1 1 70000 0x55 (nil) 7 8 9",
        "pop",
        "shared 97000",
        "push 0x1001",
        "launch 0x3000 77 1 1 128 1 1 0 0x55 (nil) 0 0 0",
        "pop",
        "CUDA_ERROR_INVALID_VALUE: the stub refuses",
    ], done.stderr
