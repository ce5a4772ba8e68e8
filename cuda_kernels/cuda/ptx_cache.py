"""A disk cache of PTX, which saves a process a second for each kernel.

The key holds all that decides the PTX: the source of this package and of `reference`, the kernel and its settings, the
compilers and the compute capability. It does not hold the code that a kernel from outside this package calls there. The
files are in the user's cache folder; removing it costs seconds. The driver caches its machine code itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from cuda_kernels.cache_folder import cache_folder

MAX_FILES = 500
"""The most files, of 20 KB each; the oldest are removed first."""

_COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "cuda-toolkit")


def remembered(function: Callable[..., None], settings: object, compile_ptx: Callable[[], str]) -> str:
    """Return the PTX of a kernel, from the cache or compiled. A folder that cannot be used is an empty cache.

    Args:
        settings: everything else that decides its PTX: numbers, strings, numba types, tuples of them.
    """
    try:
        key = repr((_package_digest(), _described(function), _described(settings)))
    except TypeError:
        return compile_ptx()
    folder = cache_folder()
    if folder is None:
        return compile_ptx()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.ptx"
    try:
        return path.read_text()
    except (OSError, ValueError):
        ptx = compile_ptx()
        _write(path, ptx)
        return ptx


def _described(value: Any) -> object:
    """A description that differs for different values, and is the same in every process.

    Raises:
        TypeError: there is none for values of this type.
    """
    value = getattr(value, "py_func", getattr(value, "_defn", value))  # device functions and intrinsics wrap it
    if isinstance(value, FunctionType):
        made_with = [_described(cell.cell_contents) for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, _described(value.__code__), made_with
    if isinstance(value, CodeType):  # whose `repr` holds its address
        return value.co_name, value.co_code, value.co_names, _described(value.co_consts)
    if isinstance(value, tuple):
        return type(value).__name__, [_described(each) for each in value]
    if value is None or type(value).__module__.partition(".")[0] in ("builtins", "numpy", "numba"):
        return repr(value)
    raise TypeError(f"{value!r} may be another one in the next process")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in sorted(path.parent.glob("*.ptx"), key=lambda each: each.stat().st_mtime)[: 1 - MAX_FILES]:
            old.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        pass


@functools.cache
def _package_digest() -> str:
    folder = Path(__file__).parent
    sources = [path.read_bytes() for path in (folder.parent / "reference.py", *sorted(folder.rglob("*.py")))]
    return hashlib.sha256(b"".join(sources) + repr([_version(name) for name in _COMPILERS]).encode()).hexdigest()


def _version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
