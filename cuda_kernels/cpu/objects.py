"""Compiled kernels on disk, loaded by address: a process that finds one imports no Numba.

Each file holds the object code of one kernel for one list of argument types. Its name is a digest of all that decides
the code: the source of `cpu.kernels`, the versions of the compilers, the processor, the kernel and the types. Files are
written whole or not at all, and processes share them. A damaged file is compiled again. Since the code runs, only files
and folders are used that belong to this user, and that no other can write to. Where there is none, as on a full disk,
every process compiles again, which takes seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from cuda_kernels.cache_folder import belongs_to_this_user, cache_folder, is_closed, make_closed, temporary_folder
from cuda_kernels.cpu.dtypes import Kind

MAX_FILES = 500
"""The most files, of 10 to 100 KB each; the oldest are removed first."""

_KERNELS = Path(__file__).parent / "kernels"
_SETTINGS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT", "NUMBA_ENABLE_AVX")
_LOCK = threading.Lock()
# A child that is forked while another thread compiles would wait for that thread forever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
_ADDRESSES: dict[str, int] = {}
_SCALARS: dict[str, Any] = {
    "q": ctypes.c_int64,
    "f": ctypes.c_float,
    "<u2": ctypes.c_uint16,
    "<i2": ctypes.c_int16,
    "<u4": ctypes.c_uint32,
}


def address_of(module: str, name: str, kinds: tuple[Kind, ...]) -> int:
    """Return the address of a function of `cpu.kernels`, compiled for arguments of these types if it is not there.

    Raises:
        RuntimeError: the package's source changed since this process began, and would have to be compiled.
    """
    with _LOCK:
        key = json.dumps([_digest(), module, name, kinds])
        if key not in _ADDRESSES:
            folder = _folder()
            path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.o" if folder is not None else None
            found = _read(path, key) if path is not None else None
            address = _load(*found) if found is not None else 0
            if not address:
                address = _compile(key, path, module, name, kinds)
            _ADDRESSES[key] = address
        return _ADDRESSES[key]


def _compile(key: str, path: Path | None, module: str, name: str, kinds: tuple[Kind, ...]) -> int:
    from cuda_kernels.cpu.kernels.build import build

    symbol, code = build(module, name, kinds)
    if _digest.__wrapped__() != _digest():
        raise RuntimeError("the source of cuda_kernels changed while this process ran: start it again")
    if path is not None:
        _write(path, key, symbol, code)
    return _load(symbol, code)


@functools.cache
def _digest() -> str:
    sources = [path.read_bytes() for path in (_KERNELS.parents[1] / "reference.py", *sorted(_KERNELS.rglob("*.py")))]
    processor = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    decides = [*processor, *(os.environ.get(name) for name in _SETTINGS), version("numba"), version("llvmlite")]
    return hashlib.sha256(b"".join([*sources, json.dumps(decides).encode()])).hexdigest()


def _folder() -> Path | None:
    """The user's cache folder, else one in the temporary directory, else None."""
    parent = cache_folder()
    if parent is not None:
        with contextlib.suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
            folder = make_closed(parent / "cpu")
            if is_closed(folder) and os.access(folder, os.W_OK | os.X_OK):
                return folder
    return temporary_folder()


def _read(path: Path, key: str) -> tuple[str, bytes] | None:
    """Return the symbol and the code in a file; None if it is missing, damaged, or open to other users."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(file, "rb") as opened:
            if not belongs_to_this_user(os.fstat(file)):
                return None
            header, code = json.loads(opened.readline()), opened.read()
        return (header["symbol"], code) if header["sha256"] == _sum(key, header["symbol"], code) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _sum(key: str, symbol: str, code: bytes) -> str:
    return hashlib.sha256(json.dumps([key, symbol]).encode() + code).hexdigest()


def _write(path: Path, key: str, symbol: str, code: bytes) -> None:
    header = {"symbol": symbol, "sha256": _sum(key, symbol, code)}
    with contextlib.suppress(OSError):
        for old in sorted(path.parent.glob("*.o"), key=lambda each: each.stat().st_mtime)[: 1 - MAX_FILES]:
            old.unlink(missing_ok=True)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, suffix=".o", delete=False) as file:
        try:
            file.write(json.dumps(header).encode() + b"\n" + code)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)


_ENGINES: list[Any] = []
"""One for each kernel, because helpers may have the same name in two of them. They live as long as their code."""


@functools.cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _load(symbol: str, code: bytes) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine().create_target_machine(jit=True))
    _ENGINES.append(engine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(symbol)  # 0 if there is no such symbol
    return address


class Kernel:
    """A function of `cpu.kernels`, called with arrays and numbers. Releases the GIL.

    Args:
        module, name: of the function. It must not raise, nor keep an array.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._entries: dict[tuple[Kind, ...], Any] = {}

    def entry(self, kinds: tuple[Kind, ...]) -> Any:
        """Return the function for arguments of these types, to be called as `entry(result, unused, *values)`.

        `result` and `unused` are addresses of 8 bytes each. An array is passed as 0, 0, its size, its item size, its
        address, its shape and its strides in bytes. It returns 0.
        """
        found = self._entries.get(kinds)
        if found is None:
            values = [ctype for kind in kinds for ctype in _ctypes_of(kind)]
            prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *values)
            found = self._entries[kinds] = prototype(address_of(self._module, self._name, kinds))
        return found

    def __call__(self, *args: Any) -> int:
        """Call the kernel with arrays, Python integers, scalars of NumPy, and tuples; return its integer, if any."""
        values: list[Any] = []
        kinds = tuple(_flatten(arg, values) for arg in args)
        result = (ctypes.c_int64 * 2)()
        address = ctypes.addressof(result)
        if self.entry(kinds)(address, address + 8, *values):
            raise RuntimeError(f"the kernel {self._name} failed")
        return result[0]


def _flatten(arg: Any, values: list[Any]) -> Kind:
    """Append what stands for an argument to `values`, and return its type."""
    if isinstance(arg, tuple):
        return tuple(_flatten(each, values) for each in arg)
    if isinstance(arg, int):
        values.append(arg)
        return "q"
    if arg.ndim == 0:
        values.append(arg.item())
        return "f" if arg.dtype == "float32" else str(arg.dtype.str)
    values += (0, 0, arg.size, arg.itemsize, arg.ctypes.data, *arg.shape, *arg.strides)
    return f"{arg.dtype.str}:{arg.ndim}{'C' if arg.flags.c_contiguous else 'A'}"


def _ctypes_of(kind: Kind) -> list[Any]:
    if isinstance(kind, tuple):
        return [each for part in kind for each in _ctypes_of(part)]
    if ":" in kind:
        return [ctypes.c_int64] * (5 + 2 * int(kind[-2]))
    return [_SCALARS[kind]]
