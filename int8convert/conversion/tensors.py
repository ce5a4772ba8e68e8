"""One tensor: read in row blocks, turned into codes and absmax, written. The memory it takes is one block per thread.

A block is read into a buffer small enough to stay in the core's cache, quantized out of it and written from the cache
too, so the weights cross main memory once on the way in and once, half as large, on the way out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from cuda_kernels.reference import N_STEPS
from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.checkpoint.writer import ShardWriter
from int8convert.conversion.events import TensorKept, TensorQuantized
from int8convert.conversion.plan import PlannedTensor
from int8convert.errors import NonFiniteWeightError

BLOCK_BYTES = 1 << 20
"""Source bytes a thread handles at a time. Larger ones leave the cache, smaller ones pay more for each system call."""


FP16_MAX = 65504.0
"""bitsandbytes computes in fp16: a row with a larger weight would come out as infinity or zero there."""


class Scratch:
    """One thread's two buffers, reused for every block and grown for a row that needs more."""

    def __init__(self) -> None:
        self._source = np.empty(BLOCK_BYTES, np.uint8)
        self._codes = np.empty(BLOCK_BYTES, np.int8)

    def source(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        if self._source.size < n_bytes:
            self._source = np.empty(n_bytes, np.uint8)
        return self._source[:n_bytes]

    def codes(self, n: int) -> npt.NDArray[np.int8]:
        if self._codes.size < n:
            self._codes = np.empty(n, np.int8)
        return self._codes[:n]


class TensorCopy:
    """A tensor that stays as it is, or in another float dtype."""

    def __init__(self, tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter) -> None:
        self._tensor = tensor
        self._reader = reader
        self._writer = writer
        self._n_non_finite: list[int] = []

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Element ranges, in order."""
        n = self._tensor.source.n_elements
        step = max(1, n) if self._tensor.source.strides is not None else BLOCK_BYTES // 8
        return ((begin, min(begin + step, n)) for begin in range(0, max(1, n), step))

    def read(self, begin: int, end: int, scratch: Scratch) -> RawBlock:
        """The bytes of the elements from `begin` to before `end`; of a strided tensor, all it spans."""
        stored = self._tensor.source
        return read_block(stored, self._reader, begin, end, scratch)

    def convert(self, raw: RawBlock, begin: int, end: int, scratch: Scratch) -> None:
        """Write those elements, in the dtype the output has."""
        stored, output_dtype = self._tensor.source, self._tensor.output_dtype
        data = raw.data if stored.strides is None else as_dense(stored, raw.data).reshape(-1).view(np.uint8)
        if output_dtype != stored.dtype:
            data = convert_floats(data, stored.dtype, output_dtype)
        self._n_non_finite.append(count_non_finite(data, output_dtype))
        self._writer.write(self._tensor.output_name, data.data, begin * DTYPE_BYTES[output_dtype])

    @property
    def file_name(self) -> str:
        return self._tensor.shard.path.name

    def finish(self) -> TensorKept:
        return TensorKept(self._tensor, sum(self._n_non_finite))


class TensorQuantization:
    """A tensor that becomes int8."""

    def __init__(self, tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter) -> None:
        self._tensor = tensor
        self._reader = reader
        self._writer = writer
        n_rows = tensor.source.shape[0]
        self._absmax = np.empty(n_rows, np.float32)
        self._signal = np.empty(n_rows, np.float64)
        self._noise = np.empty(n_rows, np.float64)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Row ranges, in order."""
        stored = self._tensor.source
        n_rows, n_columns = stored.shape
        row_bytes = n_columns * DTYPE_BYTES[stored.dtype]
        step = n_rows if stored.strides is not None else max(1, BLOCK_BYTES // row_bytes)
        return ((begin, min(begin + step, n_rows)) for begin in range(0, n_rows, step))

    def read(self, begin: int, end: int, scratch: Scratch) -> RawBlock:
        """The bytes of the rows from `begin` to before `end`; of a strided tensor, all it spans."""
        stored = self._tensor.source
        return read_block(stored, self._reader, begin * stored.shape[1], end * stored.shape[1], scratch)

    def convert(self, raw: RawBlock, begin: int, end: int, scratch: Scratch) -> None:
        """Quantize those rows and write their codes."""
        stored = self._tensor.source
        n_columns = stored.shape[1]
        if stored.strides is None:
            weight = raw.data.view(_NUMPY_DTYPE[stored.dtype]).reshape(end - begin, n_columns)
        else:
            weight = as_dense(stored, raw.data)
        codes = scratch.codes((end - begin) * n_columns).reshape(end - begin, n_columns)
        rows = slice(begin, end)
        cpu.row_quantize(_bits(weight), codes, self._absmax[rows], self._signal[rows], self._noise[rows])
        self._check_range(weight, begin, end)
        self._writer.write(self._tensor.output_name, codes.reshape(-1).view(np.uint8).data, begin * n_columns)

    def _check_range(self, weight: npt.NDArray[Any], begin: int, end: int) -> None:
        in_range = self._absmax[begin:end] <= FP16_MAX  # NaN compares false
        if in_range.all():
            return
        row = int(np.argmin(in_range))
        one_row = weight[row : row + 1]
        values = widen_bfloat16(one_row)[0] if self._tensor.source.dtype == "BF16" else one_row[0]
        outside = ~(np.abs(values.astype(np.float64)) <= FP16_MAX)
        module_name = self._tensor.output_name.removesuffix(".weight")
        raise NonFiniteWeightError(
            f"{self._tensor.source.name!r} in '{self.file_name}' holds {values[outside][0]} at row {begin + row:,}, "
            f"column {int(np.argmax(outside)):,} ({int(outside.sum()):,} such in this row): "
            f"no int8 form, or none that computes in fp16, whose largest number is {FP16_MAX:,.0f}",
            f"mend the checkpoint, or keep such modules 16-bit with --on-nonfinite keep or --skip '{module_name}'",
            module_name,
        )

    @property
    def file_name(self) -> str:
        return self._tensor.shard.path.name

    def finish(self) -> TensorQuantized:
        """Write the scales and sum up; after the last block."""
        self._writer.write(self._tensor.absmax_name, self._absmax.view(np.uint8).data)
        self._writer.write(self._tensor.format_name, memoryview(b"\0"))
        squared_scale = np.square(self._absmax.astype(np.float64) / N_STEPS)
        signal, noise = float(self._signal @ squared_scale), float(self._noise @ squared_scale)
        sqnr_db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
        return TensorQuantized(self._tensor, sqnr_db, float(self._absmax.min()), float(self._absmax.max()))


TensorTask = TensorCopy | TensorQuantization


def tensor_task(tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter) -> TensorTask:
    """The work the plan foresees for a tensor."""
    task = TensorQuantization if tensor.is_quantized else TensorCopy
    return task(tensor, reader, writer)


class BlockCounter:
    """Counts a tensor's unfinished blocks, so that whichever thread ends the last one finishes the tensor."""

    def __init__(self, task: TensorTask, n_blocks: int) -> None:
        self.task = task
        self._left = n_blocks
        self._lock = threading.Lock()

    def count_down(self) -> bool:
        """Whether this was the last block."""
        with self._lock:
            self._left -= 1
            return self._left == 0


# bf16 has no NumPy dtype: its bits are handled as int16, everything else as what it is.
_NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.int16),
}


def _bits(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The weights as `cpu.row_quantize` takes them; F64 is rounded to float32 first, as torch does."""
    if weight.dtype == np.float64:
        weight = weight.astype(np.float32)
    bits_by_dtype = {"float32": cpu.BITS_DTYPE["F32"], "float16": cpu.BITS_DTYPE["F16"]}
    return weight.view(bits_by_dtype.get(weight.dtype.name, cpu.BITS_DTYPE["BF16"]))


def widen_bfloat16(bits: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """bf16 values from their bits, exactly."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """The bits of the nearest bf16 values, ties to even, as torch rounds; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16).view(np.int16)


def convert_floats(data: npt.NDArray[np.uint8], dtype: str, output_dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes of float values in another float dtype, rounded to nearest even as torch rounds.

    By way of float32; what is too large for the new dtype becomes infinite, as it does when a loader casts.
    """
    values = data.view(_NUMPY_DTYPE[dtype])
    wide = widen_bfloat16(values) if dtype == "BF16" else values
    if output_dtype == "BF16":
        return narrow_to_bfloat16(np.ascontiguousarray(wide, np.float32)).view(np.uint8)
    with np.errstate(over="ignore"):
        return wide.astype(_NUMPY_DTYPE[output_dtype]).view(np.uint8)


_EXPONENT_BITS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}


def count_non_finite(data: npt.NDArray[np.uint8], dtype: str) -> int:
    """How many of the values in these bytes are NaN or infinite: all exponent bits set. 0 for other dtypes."""
    exponent = _EXPONENT_BITS.get(dtype)
    if exponent is None:
        return 0
    return int(np.count_nonzero((data.view(exponent.dtype) & exponent) == exponent))


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Bytes as they lie in the source.

    data: uint8, valid until the thread's next block.
    offset: of the first of them in the file.
    """

    data: npt.NDArray[np.uint8]
    offset: int


def read_block(stored: StoredTensor, reader: ShardReader, begin: int, end: int, scratch: Scratch) -> RawBlock:
    """The bytes of a contiguous tensor's elements from `begin` to before `end`, or all that a strided one spans."""
    if stored.strides is not None:
        begin, n_bytes = 0, stored.span_bytes
    else:
        n_bytes = (end - begin) * DTYPE_BYTES[stored.dtype]
    data = scratch.source(n_bytes)
    offset = stored.offset + begin * DTYPE_BYTES[stored.dtype]
    reader.read_into(data.data, offset)
    return RawBlock(data, offset)


def as_dense(stored: StoredTensor, span: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """A strided tensor made contiguous, from the bytes it spans.

    Elements other than the four float formats come as unsigned integers of their width.
    """
    dtype = _NUMPY_DTYPE.get(stored.dtype, np.dtype(f"u{DTYPE_BYTES[stored.dtype]}"))
    strides = tuple(stride * dtype.itemsize for stride in stored.strides or ())
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(span.view(dtype), stored.shape, strides))
