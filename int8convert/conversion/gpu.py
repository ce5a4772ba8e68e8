"""Quantizes blocks of rows on a CUDA device.

Each worker thread has a stream. A block is read into pinned memory, copied in, quantized and copied out, while the
thread sleeps. The other threads read, hash, write and copy, so that copies and kernels of several blocks overlap. The
CPU does the rest: decoding, merging an adapter, copying what stays 16-bit. Memory on the device: two blocks for each
thread. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.rows import BLOCK_BYTES, Scratch
from int8convert.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from cuda_kernels.cuda.launch import Launch

_DTYPE_OF_BITS = {bits: dtype for dtype, bits in cpu.BITS_DTYPE.items()}


class CudaStream:
    """A worker's queue of copies and launches on one device. A context manager: torch's current stream within."""

    def __init__(self, name: str) -> None:
        import torch

        from cuda_kernels.cuda.row_quantize import kept_bytes_of

        self._torch = torch
        self._device = torch.device(name)
        self._stream = torch.cuda.Stream(self._device)
        # The thread sleeps while it waits, so that others hash and write.
        self._done = torch.cuda.Event(blocking=True)
        self._entered = torch.cuda.stream(self._stream)
        self.kept_bytes = kept_bytes_of(self._device)

    def __enter__(self) -> CudaStream:
        self._entered.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def pinned(self, n_bytes: int) -> torch.Tensor:
        """Return memory of this machine that the device copies to and from by itself."""
        return self._torch.empty(n_bytes, dtype=self._torch.uint8, pin_memory=True)

    def empty(self, n_bytes: int) -> torch.Tensor:
        return self._torch.empty(n_bytes, dtype=self._torch.uint8, device=self._device)

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def copy_in(self, target: torch.Tensor, source: npt.NDArray[Any]) -> None:
        """Queue a copy of an array to the beginning of memory on the device."""
        array = self._bytes(source)
        target[: array.numel()].copy_(array, non_blocking=True)

    def copy_out(self, target: npt.NDArray[Any], source: torch.Tensor) -> None:
        """Queue a copy from the beginning of memory on the device to an array."""
        array = self._bytes(target)
        array.copy_(source[: array.numel()], non_blocking=True)

    def _bytes(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return self._torch.from_numpy(array.reshape(-1).view(np.uint8))

    def run(self, launches: Sequence[Launch]) -> None:
        from cuda_kernels.cuda.launch import run

        run(launches, self._device)

    def wait(self) -> None:
        self._done.record(self._stream)
        self._done.synchronize()


class CudaScratch(Scratch):
    """A worker's buffers in pinned memory, and their counterparts on the device."""

    def __init__(self, name: str, stream: CudaStream) -> None:
        self._name = name
        self._stream = stream
        super().__init__()
        with stream:
            self._weight, self._device_codes, self._sums = (stream.empty(BLOCK_BYTES) for _ in range(3))
        self._host_sums = stream.pinned(BLOCK_BYTES)

    def _empty(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        pinned: npt.NDArray[np.uint8] = self._stream.pinned(n_bytes).numpy()
        return pinned

    def row_quantize(
        self,
        bits: npt.NDArray[Any],
        codes: npt.NDArray[np.int8],
        absmax: npt.NDArray[np.float32],
        signal: npt.NDArray[np.float64],
        noise: npt.NDArray[np.float64],
    ) -> None:
        """Quantize like `cpu.row_quantize`, on the device. Returns after the results arrived."""
        if not bits.size:
            return super().row_quantize(bits, codes, absmax, signal, noise)
        with telling_of(self._name), self._stream as stream:
            self._make_room(bits)
            stream.copy_in(self._weight, bits)
            stream.run(self._launches(bits))
            stream.copy_out(codes, self._device_codes)
            sums = self._host_sums.numpy()[: 12 * len(bits)].view(np.float32).reshape(3, len(bits))
            stream.copy_out(sums, self._sums)
            stream.wait()
        absmax[:], signal[:], noise[:] = sums

    def _make_room(self, bits: npt.NDArray[Any]) -> None:
        stream, n_sum_bytes = self._stream, 12 * len(bits)
        if self._weight.numel() < bits.nbytes:
            self._weight = stream.empty(bits.nbytes)
        if self._device_codes.numel() < bits.size:
            self._device_codes = stream.empty(bits.size)
        if self._sums.numel() < n_sum_bytes:
            self._sums, self._host_sums = stream.empty(n_sum_bytes), stream.pinned(n_sum_bytes)

    def _launches(self, bits: npt.NDArray[Any]) -> list[Launch]:
        from cuda_kernels.cuda.row_quantize import launches

        rows, columns = bits.shape
        weight, codes, sums = (self._stream.address(each) for each in (self._weight, self._device_codes, self._sums))
        absmax, signal, noise = (sums + 4 * rows * k for k in range(3))
        dtype = _DTYPE_OF_BITS[bits.dtype]
        outputs = (codes, absmax, signal, noise)
        return launches(weight, dtype, (rows, columns), columns, *outputs, self._stream.kept_bytes)


@contextmanager
def telling_of(name: str) -> Iterator[None]:
    """Raise a DeviceError for what torch and the driver raise in the body."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            f"{name} failed: {str(error).splitlines()[0]}",
            "rerun the same command, or with --device cpu: the output is the same",
        ) from error
