"""PTX made before, so that a process does not wait a second for each of its kernels again.

The PTX is a function of this package's source, the kernel and what it was made with, the compilers and the compute
capability; all are in the key. Kept in the user's cache folder, a few KB each; removing the folder costs seconds,
nothing else. The driver keeps the machine code it makes of it in a cache of its own.

What it does not know: what a kernel from outside this package calls there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "cuda-toolkit")


def remembered(function: Callable[..., None], settings: object, compile_ptx: Callable[[], str]) -> str:
    """The PTX of a kernel, compiled if no one did before. A folder that cannot be used is a cache that is empty.

    Args:
        function: the kernel.
        settings: what else decides its PTX, with a `repr` that tells.
        compile_ptx: makes it.
    """
    code = function.__code__
    made_with = [cell.cell_contents for cell in function.__closure__ or ()]
    key = repr((_package_digest(), function.__qualname__, code.co_code.hex(), code.co_consts, made_with, settings))
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.ptx"
    try:
        return path.read_text()
    except (OSError, ValueError):
        ptx = compile_ptx()
        _write(path, ptx)
        return ptx


def cache_folder() -> Path:
    """`cuda_kernels` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuda_kernels"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass


@functools.cache
def _package_digest() -> str:
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(sources) + repr([_version(name) for name in _COMPILERS]).encode()).hexdigest()


def _version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
