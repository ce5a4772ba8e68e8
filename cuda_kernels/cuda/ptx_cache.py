"""PTX made before, so that a process does not wait a second for each of its kernels again.

The PTX is a function of the source of this package and of `reference`, the kernel and what it was made with, the
compilers and the compute capability; all are in the key. The files are in the user's cache folder. Removing the folder
costs seconds, nothing else. The driver keeps the machine code it makes of the PTX in a cache of its own.

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
from types import FunctionType
from typing import Any

MAX_FILES = 500
"""20 KB each; the oldest go first."""

_COMPILERS = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12", "cuda-toolkit")


def remembered(function: Callable[..., None], settings: object, compile_ptx: Callable[[], str]) -> str:
    """The PTX of a kernel, compiled if no one did before. A folder that cannot be used is a cache that is empty.

    Args:
        function: the kernel.
        settings: what else decides its PTX: numbers, strings, numba types, tuples of them.
        compile_ptx: makes it.
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
    """What tells a value from others, in this process and the next.

    Raises:
        TypeError: nothing that we know of does.
    """
    value = getattr(value, "py_func", getattr(value, "_defn", value))  # of a device function, of an intrinsic
    if isinstance(value, FunctionType):
        code, cells = value.__code__, value.__closure__ or ()
        made_with = [_described(cell.cell_contents) for cell in cells]
        return value.__module__, value.__qualname__, code.co_code, _described(code.co_consts), made_with
    if isinstance(value, tuple):
        return type(value).__name__, [_described(each) for each in value]
    if value is None or type(value).__module__.partition(".")[0] in ("builtins", "numpy", "numba"):
        return repr(value)
    raise TypeError(f"{value!r} may be another one in the next process")


def cache_folder() -> Path | None:
    """`cuda_kernels` in $XDG_CACHE_HOME, by default ~/.cache; None for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "cuda_kernels" if os.path.isabs(folder) else None


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
