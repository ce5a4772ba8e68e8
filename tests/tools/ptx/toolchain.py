"""What NVIDIA's own assembler makes of a kernel's PTX, without a GPU: resources and machine code.

`ptxas` and `nvdisasm` come with the CUDA wheels (nvidia-cuda-nvcc, nvidia-cuda-nvdisasm) or stand on PATH; without them
the calling test is skipped, with the reason.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

Capability = tuple[int, int] | tuple[int, int, str]


class Cubin(NamedTuple):
    """An assembled kernel.

    registers: per thread. spill_bytes: stored to and loaded from local memory, per thread.
    stack_bytes: local memory per thread. shared_bytes: static, per block.
    sass: nvdisasm's text. warnings: what ptxas had to say.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    sass: str
    warnings: str

    def opcodes(self) -> list[str]:
        """The machine instructions' names, in order: "LDG.E.128", "IDP.4A.S8.S8", ..."""
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", self.sass)


def architecture(cc: Capability) -> str:
    """ "sm_90a" of (9, 0, "a")."""
    return "sm_" + "".join(str(part) for part in cc)


@lru_cache(maxsize=256)
def assemble(ptx_text: str, cc: Capability) -> Cubin:
    """Assemble a PTX text of one kernel for a compute capability; ptxas' message is the error's where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx_text)
        report = _run("ptxas", "-v", f"-arch={architecture(cc)}", str(source), "-o", str(target))
        sass = _run("nvdisasm", "-c", str(target))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    warnings = "\n".join(line for line in report.splitlines() if "warning" in line.lower())
    found = [
        _number(pattern, report) for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes smem")
    ]
    return Cubin(found[0], spills, found[1], found[2], sass, warnings)


def require_valid(ptx_text: str, cc: Capability) -> None:
    """Fail with ptxas' message if it does not take the text, of any number of kernels."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.ptx")
        source.write_text(ptx_text)
        _run("ptxas", "-O0", f"-arch={architecture(cc)}", str(source), "-o", str(Path(folder, "kernels.cubin")))


def _number(pattern: str, report: str) -> int:
    found = re.findall(pattern, report)
    if len(found) > 1:
        raise ValueError(f"more than one kernel: {report}")
    return int(found[0]) if found else 0


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_find(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _find(tool: str) -> str:
    """The tool of the newest CUDA wheels in this environment, else the one on PATH; skips the test without either."""
    wheels = Path(sysconfig.get_paths()["purelib"], "nvidia")
    found = sorted(wheels.glob(f"cu*/bin/{tool}")) + sorted(wheels.glob(f"cuda_*/bin/{tool}"))
    path = str(found[-1]) if found else shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not here: install nvidia-cuda-nvcc and nvidia-cuda-nvdisasm")
    return path
