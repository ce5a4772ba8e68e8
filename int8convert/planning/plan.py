"""The plan of a conversion: the treatment of each tensor and the size of each shard.

Computed from headers, the model map and the options. Reads no weights, and writes nothing. `--dry-run` prints a plan;
the pipeline follows one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from math import lcm, prod
from typing import Any

from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.decoding.coding import Coding
from int8convert.formats import transforms
from int8convert.formats.config import int8_config
from int8convert.formats.format import Format, TensorSpecs
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.modules import module_of
from int8convert.planning.adapters.lora import LoraDelta
from int8convert.planning.calibrated_rounding import CALIBRATED, InputMoments
from int8convert.planning.fold import Fold
from int8convert.planning.folding.folding import Folding
from int8convert.planning.model_map.model_map import ModelMap

ROUNDED_DTYPES = {"float16": "F16", "bfloat16": "BF16"}
"""Dtypes that low-bit weights may be rounded to before they become int8: name in config.json -> in safetensors."""


class TensorAction(StrEnum):
    """What is done with a tensor.

    COPY: it stays as it is, or is written in another float dtype.
    QUANTIZE: it becomes int8 codes with a scale for each row.
    RECODE: it is the scale of an int8 weight, and is written as another format has it. The codes are copied.
    DEQUANTIZE: it is the codes of an int8 weight, and becomes the weights that they stand for.
    """

    COPY = "copy"
    QUANTIZE = "quantize"
    RECODE = "recode"
    DEQUANTIZE = "dequantize"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One source tensor on its way into an output shard.

    Attributes:
        source: the tensor as it is read; a Conv1D weight is the [out, in] view of its [in, out] bytes.
        output_dtype: I8 if it becomes int8 with a scale, else the dtype of the copy.
        reason: why it is copied; "" if quantized.
        format: where its scale will stand.
        coding: how its codes are decoded; None if it holds floats, or FP8 codes without a scale.
        lora: what an adapter adds to it.
        fold: what is folded into it.
        source_format: the format of an int8 weight that it belongs to, if it is recoded or dequantized.
        rounding: the measured input by which its codes are chosen; None if each weight is rounded to nearest.
        rounds_to: the 16-bit dtype that decoded weights are rounded to first; None if they stay float32.
        is_beside_codes: it is the scale or zero point of int8 codes that are written as they are.
    """

    source: StoredTensor
    shard: SourceShard = field(repr=False)
    output_name: str
    output_dtype: str
    reason: str
    format: Format
    coding: Coding | None = field(default=None, repr=False)
    lora: LoraDelta | None = field(default=None, repr=False)
    source_format: Format | None = None
    is_beside_codes: bool = False
    fold: Fold | None = field(default=None, repr=False)
    rounding: InputMoments | None = field(default=None, repr=False)
    rounds_to: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights, of which `source` may hold the codes."""
        return self.coding.weight_shape(self.source.shape) if self.coding else self.source.shape

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def row_block(self) -> int:
        """Rows that have to be in one block."""
        return lcm(self.fold.row_block if self.fold else 1, self.coding.rows_together if self.coding else 1)

    @property
    def rotates_input(self) -> bool:
        """Whether loaders rotate the module's input while the model runs."""
        return self.fold is not None and self.fold.input_block > 1

    @property
    def read_ahead(self) -> tuple[PlacedTensor, ...]:
        """What is read before the shards: its scale, the gain that is folded into it; itself if it is beside codes."""
        if self.is_beside_codes:
            return (PlacedTensor(self.source, self.shard),)
        gain = self.fold and self.fold.gain
        return (*(self.coding.beside if self.coding else ()), *([gain.weight] if gain else []))

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        """The files it is made of: its own, and those of what is read ahead."""
        return (self.shard, *(tensor.shard for tensor in self.read_ahead))

    @property
    def action(self) -> TensorAction:
        if self.source_format is not None:
            return TensorAction.DEQUANTIZE if self.source.dtype == "I8" else TensorAction.RECODE
        is_quantized = self.output_dtype == "I8" and (self.coding is not None or self.source.dtype != "I8")
        return TensorAction.QUANTIZE if is_quantized else TensorAction.COPY

    @property
    def is_quantized(self) -> bool:
        return self.action is TensorAction.QUANTIZE

    def output_specs(self) -> TensorSpecs:
        module = module_of(self.format)
        match self.action:
            case TensorAction.QUANTIZE:
                size = (transforms.BLOCK_SIZE, transforms.BLOCK_SIZE)
                matrix: TensorSpecs = {transforms.matrix_name(self.output_name): ("F16", size)}
                specs = module.weight_specs(self.output_name, self.shape)
                return {**specs, **matrix} if self.rotates_input else specs
            case TensorAction.RECODE:
                _codes, *beside = module.weight_specs(self.weight_name, (self.source.shape[0], 0)).items()
                return dict(beside)
            case TensorAction.COPY | TensorAction.DEQUANTIZE:
                return {self.output_name: (self.output_dtype, self.shape)}

    @property
    def weight_name(self) -> str:
        """The name that the weight of its module has in the output."""
        return f"{self.output_name.rpartition('.')[0]}.weight"

    @property
    def output_bytes(self) -> int:
        return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in self.output_specs().values())


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One output file.

    Attributes:
        tensors: in the order in which they are read.
        outputs: the file's tensors, in the order of its bytes.
        n_bytes: size of the file, header included.
    """

    file_name: str
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    outputs: TensorSpecs = field(repr=False)
    n_bytes: int

    @property
    def n_read_bytes(self) -> int:
        return sum(tensor.source.n_bytes for tensor in self.tensors)

    def digest(self) -> str:
        """Return a sha256 of all that decides the file's bytes. Equal for two plans that write the same bytes.

        Covers the place of the source's bytes, not their values.
        """
        tensors = [
            [
                t.shard.path.name,
                t.source.name,
                t.source.dtype,
                t.source.shape,
                t.source.offset,
                t.source.strides,
                t.output_name,
                t.output_dtype,
                t.coding and t.coding.identity(),
                t.lora and [t.lora.update.module_name, t.lora.update.scaling],
                *([t.action, t.source_format, t.format] if t.source_format else []),
                *([t.fold.identity()] if t.fold else []),
                *([t.rounding.identity] if t.rounding else []),
                *([t.rounds_to] if t.rounds_to else []),
            ]
            for t in self.tensors
        ]
        content = json.dumps([self.file_name, list(self.outputs.items()), tensors])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The plan of a conversion.

    Attributes:
        dropped: source name -> why it is not written: the same bytes are written under another name.
        folding: what is folded into the weights; None if nothing is.
        took_child: transformers was started in a child process for this plan.
    """

    source: CheckpointSource
    model_map: ModelMap
    shards: tuple[PlannedShard, ...]
    dropped: dict[str, str]
    folding: Folding | None = None
    took_child: bool = False

    @property
    def model_class(self) -> str | None:
        return self.model_map.model_class

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self.model_map.notes)

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def n_parameters(self) -> int:
        """Parameters of the model; where its class is unknown, of the written tensors."""
        needs = self.model_map.needs
        return needs.n_parameters if needs else sum(tensor.n_elements for tensor in self.tensors)

    @property
    def n_int8_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors if tensor.is_quantized)

    @property
    def coverage(self) -> float:
        """Share of the parameters that become int8, 0 to 1."""
        return self.n_int8_parameters / max(1, self.n_parameters)

    @property
    def byte_coverage(self) -> float:
        """Share of the bytes read that become int8, 0 to 1."""
        return sum(t.source.n_bytes for t in self.tensors if t.is_quantized) / max(1, self.n_read_bytes)

    @property
    def n_read_bytes(self) -> int:
        return sum(shard.n_read_bytes for shard in self.shards)

    @property
    def n_written_bytes(self) -> int:
        """Bytes of the output shards, headers included."""
        return sum(shard.n_bytes for shard in self.shards)

    def config(self, threshold: float) -> dict[str, Any]:
        """Return the output's config.json, which `quantize` writes and `verify` compares."""
        found = self.model_map
        config = self.folding.config(self.source.config) if self.folding else self.source.config
        rotated = [t.output_name.removesuffix(".weight") for t in self.tensors if t.rotates_input]
        return int8_config(config, found.output_format, found.dtype, found.skip_modules, threshold, rotated)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: totals, shards, the treatment of each tensor, and what the checkpoint lacks."""
        needs = self.model_map.needs
        return {
            "source": self.source.label,
            "commit": self.source.commit,
            "model_class": self.model_map.model_class,
            "notes": list(self.model_map.notes),
            "n_parameters": self.n_parameters,
            "n_int8_parameters": self.n_int8_parameters,
            "coverage": self.coverage,
            "byte_coverage": self.byte_coverage,
            "n_read_bytes": self.n_read_bytes,
            "n_written_bytes": self.n_written_bytes,
            "shards": [
                {"file_name": s.file_name, "n_read_bytes": s.n_read_bytes, "n_written_bytes": s.n_bytes}
                for s in self.shards
            ],
            "tensors": {
                t.output_name: {"source": t.source.name, "dtype": t.output_dtype, "reason": t.reason or None}
                | ({"round": CALIBRATED} if t.rounding else {})
                for t in self.tensors
            },
            "dropped": self.dropped,
            "missing": list(needs.missing) if needs else [],
            "unexpected": list(needs.unexpected) if needs else [],
            "mismatched": list(needs.mismatched) if needs else [],
        }

    def kept_by_reason(self) -> dict[str, tuple[int, int]]:
        """Return reason -> numbers of tensors and parameters that are copied, the most parameters first."""
        kept: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            if not tensor.is_quantized:
                n_tensors, n_parameters = kept.get(tensor.reason, (0, 0))
                kept[tensor.reason] = (n_tensors + 1, n_parameters + tensor.n_elements)
        return dict(sorted(kept.items(), key=lambda item: -item[1][1]))
