"""The CUDA driver's part: torch's context, modules, launches. Only `launch` uses this module.

A launch packs its arguments into memory reserved for them, and makes one call. Works with cuda.bindings 12 and 13,
which are imported with the first device.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from typing import Any


class CudaError(RuntimeError):
    """The driver refused a call; the message is the driver's."""


class Arguments(threading.local):
    """Memory of one thread for one kernel's arguments. The driver has copied them when a launch returns.

    Args:
        fields: a letter of `struct` for each parameter, in C's layout.
    """

    def __init__(self, fields: str) -> None:
        self._format = struct.Struct("@" + fields)
        self._values = ctypes.create_string_buffer(max(self._format.size, 1))
        ends = [struct.calcsize("@" + fields[: k + 1]) for k in range(len(fields))]
        starts = [end - struct.calcsize(field) for end, field in zip(ends, fields, strict=True)]
        base = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * max(len(fields), 1))(*(base + start for start in starts))
        self._address = ctypes.addressof(self._pointers)

    def pack(self, args: tuple[int | float, ...]) -> int:
        """Write the values; return the address of the array of their addresses."""
        self._format.pack_into(self._values, 0, *args)
        return self._address


class Device:
    """A device's primary context, which is torch's. As a context manager it makes that context current.

    Attributes:
        capability: the compute capability to compile for: the device's, or the newest older one that the toolkit knows.
        most_shared_bytes: the most shared memory of a block, static and dynamic together.
    """

    def __init__(self, index: int) -> None:
        import torch
        from cuda.bindings import driver, nvrtc

        torch.cuda.init()
        self.index = index
        self.driver = driver
        known = [divmod(each, 10) for each in check(nvrtc.nvrtcGetSupportedArchs())]
        own = torch.cuda.get_device_capability(index)
        self.capability = max(each for each in known if each <= own)
        handle = check(driver.cuDeviceGet(index))
        self._context = check(driver.cuDevicePrimaryCtxRetain(handle))
        shared = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.most_shared_bytes: int = check(driver.cuDeviceGetAttribute(shared, handle))

    def __enter__(self) -> Device:
        # A thread that has not used torch's CUDA yet has no current context, and any thread may have another one.
        check(self.driver.cuCtxPushCurrent(self._context))
        return self

    def __exit__(self, *_error: object) -> None:
        check(self.driver.cuCtxPopCurrent())


held_device = functools.cache(Device)
"""Return the one `Device` of an index."""


class Function:
    """A kernel loaded on one device. The device must be current when it is made."""

    def __init__(self, driver: Any, ptx: str, threads: int, arguments: Arguments) -> None:
        self._driver, self._threads, self._arguments = driver, threads, arguments
        (entry,) = re.findall(r"\.visible\s+\.entry\s+([\w$]+)", ptx)
        self._module = check(driver.cuModuleLoadData(ptx.encode() + b"\0"))
        self._function = check(driver.cuModuleGetFunction(self._module, entry.encode()))
        # Where the driver loads lazily, a kernel's code comes with the first question about it, which a launch within
        # the capture of a graph may not be.
        check(driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, self._function))
        self._most_shared = 0

    def launch(self, grid: tuple[int, int, int], shared_bytes: int, args: tuple[int | float, ...], stream: int) -> None:
        """Queue one launch on a stream of the current context."""
        if shared_bytes > self._most_shared:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(self._driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
            self._most_shared = shared_bytes
        packed = self._arguments.pack(args)
        answer = self._driver.cuLaunchKernel(
            self._function, *grid, self._threads, 1, 1, shared_bytes, stream, packed, 0
        )
        if answer[0]:
            check(answer)


def check(answer: tuple[Any, ...]) -> Any:
    """Return the value in a driver call's answer, which starts with an error code; a tuple of several values."""
    error, *values = answer
    if error:
        from cuda.bindings import driver

        _, text = driver.cuGetErrorString(error)
        raise CudaError(f"{error.name}: {text.decode() if text else 'unknown'}")
    return values[0] if len(values) == 1 else tuple(values)
