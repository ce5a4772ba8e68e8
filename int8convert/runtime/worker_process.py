"""Child process in which transformers works on an untrusted config, apart from the process that reads and writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start_worker(module: str) -> subprocess.Popen[str]:
    """Start a module of this package, with pipes for a request in JSON and its answer.

    The child uses no network, sees no GPU, and imports nothing from the current directory.
    """
    package_root = str(Path(__file__).parents[2])
    # -P: a torch.py in the current directory, which may be the checkpoint itself, must not be imported.
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TRANSFORMERS_VERBOSITY": "error",
        },
    )
