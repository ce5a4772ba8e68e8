#!/usr/bin/env python3
"""What `gpu_session` runs beside tests and benches: the machine's description, a tiny run of each kernel, the one JSON.

Without options: prints what the machine is. `--kernels`: runs each kernel once, small, for compute-sanitizer, which
slows it a hundredfold. `--join DIRECTORY`: puts the session's JSON files together under the GPU's name.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = (
    "torch",
    "triton",
    "numba",
    "numba-cuda",
    "cuda-bindings",
    "cuda-core",
    "transformers",
    "bitsandbytes",
    "numpy",
)
PARTS = ("environment", "kernels", "runtime")


def describe() -> dict[str, Any]:
    """Versions and the device; no names, no paths."""
    import torch

    from cuda_kernels.cuda import launch

    found: dict[str, Any] = {"python": platform.python_version(), "kernels_unavailable": launch.unavailable()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"]
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver_and_clocks": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        }
    return found


def run_kernels() -> None:
    """Each kernel once, on shapes with tails."""
    import torch

    from cuda_kernels import ops
    from cuda_kernels.reference import QuantizedWeight

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for n_columns in (80, 1000, 5000):
            weight = torch.randn(37, n_columns, device="cuda").to(dtype)
            side = weight[:, [3, 40]].contiguous()
            quantized = QuantizedWeight(*ops.row_quantize(weight)[:2], side, None)
            columns = torch.tensor([3, 40], dtype=torch.int32, device="cuda")
            for n_tokens in (1, 8, 30, 70):
                x = (3 * torch.randn(n_tokens, n_columns, device="cuda")).to(dtype)
                for capacity in (0, 64):
                    ops.int8_linear(x, quantized, columns, 6.0, capacity)
    torch.cuda.synchronize()


def join(folder: Path) -> None:
    """One file of the parts that there are."""
    parts = {p: json.loads((folder / f"{p}.json").read_text()) for p in PARTS if (folder / f"{p}.json").exists()}
    name = str(parts.get("environment", {}).get("gpu", "no-gpu")).lower().replace(" ", "-")
    (folder / f"{name}.json").write_text(json.dumps({"schema": 1, **parts}, indent=1) + "\n")
    for part in parts:
        (folder / f"{part}.json").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--join", type=Path, metavar="DIRECTORY")
    chosen = parser.parse_args()
    if chosen.join:
        join(chosen.join)
    elif chosen.kernels:
        run_kernels()
    else:
        text = json.dumps(describe(), indent=1)
        print(text)
        if chosen.json:
            chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
