"""From a kernel's Python function to its run on torch's current stream.

1. A `Kernel` is compiled to PTX on its first use, once for a compute capability: no driver needed, so tests do it, too.
2. An operation's planning function maps addresses and sizes to a list of `Launch`: no device needed.
3. `run` has the driver load the PTX, once for a device, and queues the launches. It waits for nothing: the launches can
   be captured in a CUDA graph, if `load` has seen their kernels before.

Left out on purpose: Numba's own dispatcher, which parses array arguments at every launch, and owns a stream of its own.
Importing this module loads neither numba-cuda nor torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import struct
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

OLDEST_CAPABILITY = (7, 5)
"""Turing: what the CUDA 13 toolkit still compiles for."""

_FIELD = {"uint32": "I", "int32": "i", "uint64": "Q", "int64": "q", "float32": "f"}


class CudaError(RuntimeError):
    """The driver refused; the message is its own."""


class Kernel:
    """A plain function on pointers and numbers, what it is compiled for, and what it was compiled to.

    Args:
        function: Python, at module level, in the subset Numba-CUDA compiles.
        signature: numba types, one for each parameter: `CPointer(T)`, int32, uint32, int64, uint64 or float32.
        threads: of every block it is launched with.
        min_blocks: how many blocks a multiprocessor is to hold at least: bounds the registers.
    """

    def __init__(
        self, function: Callable[..., None], signature: tuple[Any, ...], threads: int, min_blocks: int = 1
    ) -> None:
        self.function, self.signature, self.threads, self.min_blocks = function, signature, threads, min_blocks
        self.name = function.__name__
        self.arguments = _Arguments("".join("Q" if str(t).endswith("*") else _FIELD[str(t)] for t in signature))
        self._ptx: dict[tuple[int, int], str] = {}
        self._loaded: dict[int, _Function] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Kernel({self.name}, {self.signature}, {self.threads})"

    def ptx(self, cc: tuple[int, int]) -> str:
        """The kernel for one compute capability, as PTX with one entry."""
        if cc not in self._ptx:
            from numba import cuda

            bounds = (self.threads, self.min_blocks)
            signature = cuda.types.void(*self.signature)
            self._ptx[cc], _ = cuda.compile(
                self.function, signature, device=False, abi="numba", cc=cc, output="ptx", launch_bounds=bounds
            )
        return self._ptx[cc]

    def loaded(self, device: _Device) -> _Function:
        """The kernel as the driver knows it; the device's context must be current."""
        if device.index not in self._loaded:
            with self._lock:
                if device.index not in self._loaded:
                    self._loaded[device.index] = _Function(self, device)
        return self._loaded[device.index]


class Launch(NamedTuple):
    """One launch: everything but the stream. The block has the kernel's `threads`."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: tuple[int | float, ...]


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Queue launches, in order, on torch's current stream of a device.

    What the addresses point to must live until the stream has run them; torch's allocator sees to that for tensors
    that were made for the same stream.

    Raises:
        CudaError: what the driver says about a launch it refuses.
    """
    import torch

    stream = torch.cuda.current_stream(device).cuda_stream
    with _held(_index(device)) as held:
        for launch in launches:
            launch.kernel.loaded(held).launch(launch, stream)


def load(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compile and load kernels, as a first `run` would do; loading is not allowed while a CUDA graph is captured."""
    with _held(_index(device)) as held:
        for kernel in kernels:
            kernel.loaded(held)


def most_shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have on a device, static and dynamic together."""
    return _held(_index(device)).most_shared_bytes


def unavailable(device: torch.device | None = None) -> str | None:
    """Why CUDA kernels cannot run here, as the end of a sentence; None if they can.

    Args:
        device: a CUDA device, by default torch's current one.
    """
    for package in ("numba_cuda", "cuda.bindings"):
        if not _is_installed(package):
            return "numba-cuda is missing; the extra int8convert[cuda13] (or [cuda12]) brings it"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    index = _index(device or torch.device("cuda"))
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices, and cuda:{index} is not one of them"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return "compute capability {}.{} is older than {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return _too_old_driver()


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _too_old_driver() -> str | None:
    """A driver takes the PTX of toolkits up to its own version."""
    from cuda.bindings import driver, nvrtc

    toolkit = _check(nvrtc.nvrtcVersion())
    version = _check(driver.cuDriverGetVersion())
    supported = (version // 1000, version % 1000 // 10)
    if supported >= toolkit:
        return None
    return "the driver is for CUDA {}.{}, older than the toolkit here, {}.{}".format(*supported, *toolkit)


class _Arguments(threading.local):
    """A thread's own room for one kernel's arguments; the driver has copied them when a launch returns."""

    def __init__(self, fields: str) -> None:
        self._format = struct.Struct("@" + fields)
        self._values = ctypes.create_string_buffer(max(self._format.size, 1))
        ends = [struct.calcsize("@" + fields[: k + 1]) for k in range(len(fields))]
        starts = [end - struct.calcsize(field) for end, field in zip(ends, fields, strict=True)]
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * max(len(fields), 1))(*(base + start for start in starts))
        self._address = ctypes.addressof(self._pointers)

    def pack(self, args: tuple[int | float, ...]) -> int:
        """Put the values in place; returns the address of the array of their addresses."""
        self._format.pack_into(self._values, 0, *args)
        return self._address


class _Device:
    """A device's primary context, which is torch's."""

    def __init__(self, index: int) -> None:
        import torch
        from cuda.bindings import driver

        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.index = index
        self.capability = torch.cuda.get_device_capability(index)
        self._driver = driver
        handle = _check(driver.cuDeviceGet(index))
        self._context = _check(driver.cuDevicePrimaryCtxRetain(handle))
        shared = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.most_shared_bytes: int = _check(driver.cuDeviceGetAttribute(shared, handle))

    def __enter__(self) -> _Device:
        # A thread that has not used torch's CUDA yet has no current context, and any thread may be at another device.
        _check(self._driver.cuCtxPushCurrent(self._context))
        return self

    def __exit__(self, *_error: object) -> None:
        _check(self._driver.cuCtxPopCurrent())


_held = functools.cache(_Device)


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


class _Function:
    """A kernel loaded on one device."""

    def __init__(self, kernel: Kernel, device: _Device) -> None:
        from cuda.bindings import driver

        self._driver, self._arguments, self._threads = driver, kernel.arguments, kernel.threads
        ptx = kernel.ptx(device.capability)
        entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)", ptx)
        assert entry, "PTX without an entry"
        self._module = _check(driver.cuModuleLoadData(ptx.encode() + b"\0"))
        self._function = _check(driver.cuModuleGetFunction(self._module, entry[1].encode()))
        self._most_shared = 0

    def launch(self, launch: Launch, stream: int) -> None:
        if launch.shared_bytes > self._most_shared:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(self._driver.cuFuncSetAttribute(self._function, attribute, launch.shared_bytes))
            self._most_shared = launch.shared_bytes
        x, y, z = launch.grid
        packed = self._arguments.pack(launch.args)
        error = self._driver.cuLaunchKernel(
            self._function, x, y, z, self._threads, 1, 1, launch.shared_bytes, stream, packed, 0
        )
        if error[0]:
            _check(error)


def _check(answer: tuple[Any, ...]) -> Any:
    """The values of a driver call's answer, without the error that it starts with.

    Raises:
        CudaError: if that is not success.
    """
    error, *values = answer
    if error:
        raise CudaError(f"{error.name}: {_meaning(error)}")
    return values[0] if len(values) == 1 else tuple(values)


def _meaning(error: Any) -> str:
    from cuda.bindings import driver

    _, text = driver.cuGetErrorString(error)
    return text.decode() if text else "no explanation"
