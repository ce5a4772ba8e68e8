"""The work on one tensor, a class for each action of the plan. Memory: one block for each thread.

A block is read into a buffer that stays in the core's cache, is converted there and written from there. So weights
cross main memory once on the way in and once, half as large, on the way out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels.reference import N_STEPS
from int8convert.checkpoint.floats import convert_floats, count_non_finite, kernel_bits, widen
from int8convert.checkpoint.rows import Block, Scratch, as_array, read_rows
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.conversion.calibrated_rows import CalibrationInputs, RowRounding
from int8convert.conversion.records import kept_event, quantized_event
from int8convert.conversion.source_rows import SourceRows
from int8convert.errors import NonFiniteWeightError, SourceError
from int8convert.events import TensorKept, TensorQuantized
from int8convert.formats import transforms
from int8convert.formats.modules import module_of
from int8convert.planning.plan import PlannedTensor, TensorAction
from int8convert.trace import span

FP16_MAX = 65504.0
"""Largest magnitude of a weight: bitsandbytes computes in fp16, where a larger one becomes infinity."""

_GLANCE_BYTES = 4096
"""Bytes of a block that are tested for zeros before the rest: nearly every block has a value other than zero there."""


class TensorCopy:
    """A tensor that is written in a float dtype: as it is, or decoded from codes."""

    def __init__(self, tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter) -> None:
        self._tensor = tensor
        self._reader = reader
        self._writer = writer
        self._rows = SourceRows(tensor, _without_dimensions(tensor))
        self._n_non_finite: list[int] = []
        self._n_zeros: list[int] = []

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Return row ranges, in order. What was prefetched is one range, as it was fetched."""
        is_one = self._tensor.is_beside_codes
        return iter([(0, self._rows.shape[0])]) if is_one else self._rows.ranges()

    def read(self, begin: int, end: int, scratch: Scratch) -> Block:
        return self._rows.read(self._reader, begin, end, scratch)

    def convert(self, block: Block, begin: int, end: int, scratch: Scratch) -> None:
        """Write those rows in the dtype of the output."""
        output_dtype = self._tensor.output_dtype
        values = self._rows.values(block, begin, end)
        data = values.reshape(-1).view(np.uint8)
        if output_dtype != self._rows.dtype:
            data = convert_floats(data, self._rows.dtype, output_dtype)
        n_non_finite = count_non_finite(data, output_dtype)
        if n_non_finite and self._tensor.fold and np.isfinite(values).all():
            raise SourceError(
                f"{self._tensor.output_name!r} does not fit {output_dtype} after the fold: its largest magnitude "
                f"becomes {float(np.abs(values).max()):.3g}",
                "convert without --rotate, --rotate-inputs and --smooth",
            )
        self._n_non_finite.append(n_non_finite)
        if not data[:_GLANCE_BYTES].any() and not data.any():
            self._n_zeros.append(data.size // DTYPE_BYTES[output_dtype])
        row_bytes = math.prod(self._rows.shape[1:]) * DTYPE_BYTES[output_dtype]
        self._writer.write(self._tensor.output_name, data.data, begin * row_bytes)

    def finish(self) -> TensorKept:
        shape = self._tensor.shape
        n_zero_rows = sum(self._n_zeros) // math.prod(shape[1:]) if len(shape) == 2 and min(shape) else 0
        return kept_event(self._tensor, sum(self._n_non_finite), n_zero_rows)


def _without_dimensions(tensor: PlannedTensor) -> StoredTensor:
    """Return the tensor in one dimension where rows do not matter, so that no row is too long for a block."""
    stored = tensor.source
    if stored.strides is not None or tensor.coding or tensor.lora or tensor.fold:
        return stored
    return replace(stored, shape=(stored.n_elements,))


class TensorQuantization:
    """A tensor that becomes int8."""

    def __init__(
        self, tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter, inputs: CalibrationInputs
    ) -> None:
        self._tensor = tensor
        self._reader = reader
        self._writer = writer
        self._rows = SourceRows(tensor)
        n_rows = self._rows.shape[0]
        self._absmax = np.empty(n_rows, np.float32)
        self._signal = np.empty(n_rows, np.float64)
        self._noise = np.empty(n_rows, np.float64)
        self._rounding = RowRounding(tensor.rounding, n_rows, inputs) if tensor.rounding else None

    def blocks(self) -> Iterator[tuple[int, int]]:
        return self._rows.ranges()

    def read(self, begin: int, end: int, scratch: Scratch) -> Block:
        return self._rows.read(self._reader, begin, end, scratch)

    def convert(self, block: Block, begin: int, end: int, scratch: Scratch) -> None:
        """Quantize those rows and write their codes."""
        weight = self._rows.values(block, begin, end)
        codes = scratch.codes(weight.size).reshape(weight.shape)
        rows = slice(begin, end)
        bits = kernel_bits(weight, self._rows.dtype)
        with span("quantize", weight.nbytes):
            scratch.row_quantize(bits, codes, self._absmax[rows], self._signal[rows], self._noise[rows])
        self._check_range(weight, begin, end)
        if self._rounding:
            values = widen(weight, self._rows.dtype)
            self._rounding.round(values, begin, codes, self._absmax[rows], self._noise[rows])
        self._writer.write(self._tensor.output_name, codes.reshape(-1).view(np.uint8).data, begin * weight.shape[1])

    def _check_range(self, weight: npt.NDArray[Any], begin: int, end: int) -> None:
        in_range = self._absmax[begin:end] <= FP16_MAX  # NaN compares false
        if in_range.all():
            return
        row = int(np.argmin(in_range))
        values = widen(weight[row : row + 1], self._rows.dtype)[0]
        outside = ~(np.abs(values) <= FP16_MAX)
        module_name = self._tensor.output_name.removesuffix(".weight")
        raise NonFiniteWeightError(
            f"{self._tensor.source.name!r} in '{self._tensor.shard.path.name}' holds {_shown(values[outside][0])} "
            f"at row {begin + row:,}, column {int(np.argmax(outside)):,}{self._count_outside()}; "
            f"int8 rows need finite values up to {FP16_MAX:,.0f}",
            "pass --on-nonfinite keep to leave such modules 16-bit, or fetch the checkpoint again",
            module_name,
        )

    def _count_outside(self) -> str:
        """Return the number of values that int8 rows cannot hold, for the error; "" for a shard on the Hub."""
        if self._tensor.shard.remote is not None:
            return ""
        count = 0
        scratch = Scratch()
        for begin, end in self.blocks():
            values = widen(self._rows.values(self.read(begin, end, scratch), begin, end), self._rows.dtype)
            count += int(np.count_nonzero(~(np.abs(values) <= FP16_MAX)))
        return f" ({count:,} such value{'s' if count != 1 else ''})"

    def finish(self) -> TensorQuantized:
        """Write the scales and return the event. Called after the last block."""
        module = module_of(self._tensor.format)
        stored = module.from_absmax(self._absmax)
        for name, data in module.tensors_beside(self._tensor.output_name, stored).items():
            self._writer.write(name, data)
        if self._tensor.rotates_input:
            matrix = transforms.matrix().reshape(-1).view(np.uint8)
            self._writer.write(transforms.matrix_name(self._tensor.output_name), matrix.data)
        squared_scale = np.square(self._absmax.astype(np.float64) / N_STEPS)
        signal, noise = float(self._signal @ squared_scale), float(self._noise @ squared_scale)
        sqnr_db = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
        n_zero_rows = int(np.count_nonzero(self._absmax == 0))
        absmax_range = float(self._absmax.min()), float(self._absmax.max())
        rounding = self._rounding.outcome() if self._rounding else None
        return quantized_event(self._tensor, sqnr_db, absmax_range, n_zero_rows, rounding=rounding)


def _shown(value: Any) -> str:
    if np.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    return "NaN" if np.isnan(value) else f"{value:g}"


class ScaleRecoding:
    """The scales of an int8 weight, which are written as another format has them."""

    def __init__(self, tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter) -> None:
        self._tensor = tensor
        self._reader = reader
        self._writer = writer
        self._stored = replace(tensor.source, shape=(tensor.source.n_elements,))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield one range: the scales are small, and are written as one."""
        yield 0, self._stored.shape[0]

    def read(self, begin: int, end: int, scratch: Scratch) -> Block:
        return read_rows(self._stored, self._reader, begin, end, scratch)

    def convert(self, block: Block, begin: int, end: int, scratch: Scratch) -> None:
        """Write the scales, and what else the format's loader demands beside the codes."""
        assert self._tensor.source_format is not None
        source, target = module_of(self._tensor.source_format), module_of(self._tensor.format)
        values = widen(as_array(self._stored, block, begin, end), self._stored.dtype)
        stored = target.from_scale(source.to_scale(values))
        for name, data in target.tensors_beside(self._tensor.weight_name, stored).items():
            self._writer.write(name, data)

    def finish(self) -> TensorKept:
        return kept_event(self._tensor, 0, 0)


TensorTask = TensorCopy | TensorQuantization | ScaleRecoding


def tensor_task(
    tensor: PlannedTensor, reader: ShardReader, writer: ShardWriter, inputs: CalibrationInputs
) -> TensorTask:
    """Return the work that the plan foresees for a tensor."""
    match tensor.action:
        case TensorAction.QUANTIZE:
            return TensorQuantization(tensor, reader, writer, inputs)
        case TensorAction.RECODE:
            return ScaleRecoding(tensor, reader, writer)
        case TensorAction.COPY | TensorAction.DEQUANTIZE:
            return TensorCopy(tensor, reader, writer)


class BlockCounter:
    """Counts a tensor's unfinished blocks, so that the thread that ends the last one finishes the tensor."""

    def __init__(self, task: TensorTask, n_blocks: int) -> None:
        self.task = task
        self._left = n_blocks
        self._lock = threading.Lock()

    def count_down(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0
