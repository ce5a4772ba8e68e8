"""One int8 weight or other tensor on its way into another format: what it becomes, and its bytes.

Codes are copied in blocks of a megabyte, whatever the format; only the scale beside them is written otherwise. To
dequantize, rows are read in blocks too, except for Conv1D, whose rows are the columns of the model's own weight: there
the codes of one tensor, up to 10 MB in GPT-2 XL, are held at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import convert_floats
from int8convert.checkpoint.rows import BLOCK_BYTES, Scratch, row_ranges
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.formats.format import Format, TensorSpecs
from int8convert.formats.int8_checkpoint import Int8Weight, PlacedTensor, SourceReaders
from int8convert.formats.modules import module_of


@dataclass(frozen=True, slots=True)
class Target:
    """What int8 weights become.

    Attributes:
        source_format: what they are.
        format: what they become; None if they are dequantized.
        dtype: safetensors' name of what they are dequantized to; "" otherwise.
    """

    source_format: Format
    format: Format | None
    dtype: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether every tensor stays as it is."""
        return self.format is self.source_format

    def output_specs(self, item: Int8Weight | PlacedTensor) -> TensorSpecs:
        """The tensors an item becomes: name -> (dtype, shape)."""
        if isinstance(item, PlacedTensor):
            return {item.name: (item.stored.dtype, item.stored.shape)}
        if self.is_copy:
            return {part.name: (part.stored.dtype, part.stored.shape) for part in item.parts}
        rows, columns = item.codes.stored.shape
        if self.format is None:
            return {
                f"{item.module_name}.weight": (self.dtype, (columns, rows) if item.is_transposed else (rows, columns))
            }
        return module_of(self.format).weight_specs(f"{item.module_name}.weight", (rows, columns))


class ItemWriter:
    """Writes items into one output shard.

    Attributes:
        n_changed_scales: rows whose scale no absmax gives back exactly, see `formats.scales`.
    """

    def __init__(self, target: Target, readers: SourceReaders, writer: ShardWriter) -> None:
        self._target = target
        self._readers = readers
        self._writer = writer
        self._scratch = Scratch()
        self.n_changed_scales = 0

    def write(self, item: Int8Weight | PlacedTensor) -> None:
        """Write all an item becomes."""
        if isinstance(item, PlacedTensor):
            self._copy(item, item.name)
        elif self._target.is_copy:
            for part in item.parts:
                self._copy(part, part.name)
        elif self._target.format is None:
            self._dequantize(item)
        else:
            self._convert(item, self._target.format)

    def _copy(self, tensor: PlacedTensor, output_name: str) -> None:
        stored = tensor.stored
        if stored.strides is not None:
            at = 0
            for first, last in row_ranges(stored):
                data = self._readers.read_strided(tensor, first, last, self._scratch)
                self._writer.write(output_name, data.data, at)
                at += data.size
            return
        for begin in range(0, stored.n_bytes, BLOCK_BYTES):
            block = self._scratch.source(min(BLOCK_BYTES, stored.n_bytes - begin))
            self._readers.read(tensor, block.data, begin)
            self._writer.write(output_name, block.data, begin)

    def _convert(self, weight: Int8Weight, target: Format) -> None:
        module = module_of(target)
        self._copy(weight.codes, module.NAMES.under(weight.module_name).codes)
        scale = module_of(self._target.source_format).to_scale(self._readers.read_scale(weight.scale))
        stored = module.from_scale(scale)
        self.n_changed_scales += int(np.count_nonzero(module.to_scale(stored) != scale))
        for name, data in module.tensors_beside(f"{weight.module_name}.weight", stored).items():
            self._writer.write(name, data)

    def _dequantize(self, weight: Int8Weight) -> None:
        scale = self._readers.read_scale(weight.scale)
        output_name = f"{weight.module_name}.weight"
        at = 0
        for rows, codes in self._blocks(weight):
            data = self._weights_of(codes, scale[rows], weight.is_transposed)
            self._writer.write(output_name, data.data, at)
            at += data.size

    def _blocks(self, weight: Int8Weight) -> Iterator[tuple[slice, npt.NDArray[np.int8]]]:
        """Codes and the rows they belong to, in the order in which their weights are written."""
        n_rows, n_columns = weight.codes.stored.shape
        if weight.is_transposed:
            codes = self._readers.read_all(weight.codes).view(np.int8).reshape(n_rows, n_columns)
            step = max(1, BLOCK_BYTES // n_rows)
            for begin in range(0, n_columns, step):
                yield slice(None), codes[:, begin : begin + step]
            return
        step = max(1, BLOCK_BYTES // n_columns)
        for begin in range(0, n_rows, step):
            end = min(begin + step, n_rows)
            data = np.empty((end - begin) * n_columns, np.uint8)
            self._readers.read(weight.codes, data.data, begin * n_columns)
            yield slice(begin, end), data.view(np.int8).reshape(end - begin, n_columns)

    def _weights_of(
        self, codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float32], is_transposed: bool
    ) -> npt.NDArray[np.uint8]:
        """The bytes of the weights: what the source's own loader computes in float32, rounded once."""
        weights = module_of(self._target.source_format).dequantize(codes, scale)
        flat = np.ascontiguousarray(weights.T if is_transposed else weights).reshape(-1)
        return convert_floats(flat.view(np.uint8), "F32", self._target.dtype)
