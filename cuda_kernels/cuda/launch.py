"""From a kernel's Python function to its run on torch's current stream.

1. A `Kernel` is compiled to PTX on its first use, once for each compute capability. That needs no driver.
2. An operation's planning function maps addresses and sizes to a list of `Launch`. That needs no device.
3. `run` has the driver load the PTX, once for each device, and queues the launches without waiting. A CUDA graph can
   capture them if `load` has loaded their kernels before.

Numba's own dispatcher is left out on purpose: it parses array arguments at every launch, and has its own stream.
Importing this module loads neither numba-cuda nor torch.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_kernels.cuda.driver import Arguments, CudaError, Device, Function, check, held_device
from cuda_kernels.cuda.ptx_cache import remembered

if TYPE_CHECKING:
    import torch

__all__ = ["CudaError", "Kernel", "Launch", "load", "most_shared_bytes", "run", "unavailable"]

OLDEST_CAPABILITY = (7, 5)
"""The oldest compute capability that the CUDA 13 toolkit compiles for: Turing's."""

_FIELD = {"uint32": "I", "int32": "i", "uint64": "Q", "int64": "q", "float32": "f"}


class Kernel:
    """A plain function on pointers and numbers, the settings it is compiled with, and the PTX.

    Args:
        function: Python, at module level, in the subset Numba-CUDA compiles.
        signature: numba types, one for each parameter: `CPointer(T)`, int32, uint32, int64, uint64 or float32.
        threads: threads of every block.
        min_blocks: the fewest blocks that a multiprocessor must hold, which bounds the registers.
    """

    def __init__(
        self, function: Callable[..., None], signature: tuple[Any, ...], threads: int, min_blocks: int = 1
    ) -> None:
        self.function, self.signature, self.threads, self.min_blocks = function, signature, threads, min_blocks
        self.name = function.__name__
        self.arguments = Arguments("".join("Q" if str(t).endswith("*") else _FIELD[str(t)] for t in signature))
        self._ptx: dict[tuple[int, int], str] = {}
        self._loaded: dict[int, Function] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Kernel({self.name}, {self.signature}, {self.threads})"

    def ptx(self, cc: tuple[int, int]) -> str:
        """Return the kernel's PTX for one compute capability; it has one entry."""
        if cc not in self._ptx:
            settings = (self.signature, self.threads, self.min_blocks, cc)
            self._ptx[cc] = remembered(self.function, settings, lambda: self._compile(cc))
        return self._ptx[cc]

    def _compile(self, cc: tuple[int, int]) -> str:
        from numba import cuda

        bounds = (self.threads, self.min_blocks)
        signature = cuda.types.void(*self.signature)
        ptx, _ = cuda.compile(
            self.function, signature, device=False, abi="numba", cc=cc, output="ptx", launch_bounds=bounds
        )
        return str(ptx)

    def loaded(self, device: Device) -> Function:
        """Return the kernel loaded on a device, which must be current."""
        if device.index not in self._loaded:
            with self._lock:
                if device.index not in self._loaded:
                    ptx = self.ptx(device.capability)
                    self._loaded[device.index] = Function(device.driver, ptx, self.threads, self.arguments)
        return self._loaded[device.index]


class Launch(NamedTuple):
    """One launch, except its stream. The block has the kernel's `threads`."""

    kernel: Kernel
    grid: tuple[int, int, int]
    shared_bytes: int
    args: tuple[int | float, ...]


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Queue launches, in order, on torch's current stream of a device.

    The memory at the addresses must live until the stream has run the launches. torch's allocator ensures that for
    tensors that were allocated on the same stream.

    Raises:
        CudaError: the driver refuses a launch.
    """
    import torch

    stream = torch.cuda.current_stream(device).cuda_stream
    with held_device(_index(device)) as held:
        for launch in launches:
            launch.kernel.loaded(held).launch(launch.grid, launch.shared_bytes, launch.args, stream)


def load(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Compile and load kernels as their first `run` would; loading is not allowed while a CUDA graph is captured."""
    with held_device(_index(device)) as held:
        for kernel in kernels:
            kernel.loaded(held)


def most_shared_bytes(device: torch.device) -> int:
    """The most shared memory of a block on a device, static and dynamic together, in bytes."""
    return held_device(_index(device)).most_shared_bytes


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why CUDA kernels cannot run here, as the end of a sentence, or None if they can.

    Args:
        device: a CUDA device, by default torch's current one.
    """
    for package in ("numba_cuda", "cuda.bindings"):
        if not _is_installed(package):
            return "numba-cuda is missing; the extra int8convert[cuda13] (or [cuda12]) brings it"
    import torch

    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that is too old for it
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    if not is_available:
        return "torch sees no CUDA device" + "".join(f": {str(each.message).splitlines()[0]}" for each in caught[:1])
    index = _index(device or torch.device("cuda"))
    n_devices = torch.cuda.device_count()
    if index >= n_devices:
        return f"torch sees {n_devices} CUDA device{'' if n_devices == 1 else 's'}, and cuda:{index} is not among them"
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
    """Return why the driver is too old, or None: it takes the PTX of toolkits up to its own version."""
    from cuda.bindings import driver, nvrtc

    toolkit = check(nvrtc.nvrtcVersion())
    version = check(driver.cuDriverGetVersion())
    supported = (version // 1000, version % 1000 // 10)
    if supported >= toolkit:
        return None
    return "the driver is for CUDA {}.{}, older than the toolkit here, {}.{}".format(*supported, *toolkit)


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index
