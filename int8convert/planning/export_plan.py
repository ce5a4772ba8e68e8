"""The plan of an export: shards, their tensors, and config.json. Refuses what no loader could read.

Codes are copied in every format. Their scale is recoded, or they are dequantized by it. A plan is made from headers,
config.json and the scales, which `int8_checkpoint` has checked. Codes are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.checkpoint.names import shard_name
from int8convert.checkpoint.safetensors_file import METADATA_NAME, FileMetadata
from int8convert.checkpoint.shard_writer import order_for_alignment, planned_shard_bytes
from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.int8 import Int8Coding
from int8convert.errors import CorruptFileError, FormatError
from int8convert.formats.config import BLOCK, int8_config, plain_config, read_threshold
from int8convert.formats.format import Format, TensorSpecs
from int8convert.formats.int8_checkpoint import DTYPES, Int8Checkpoint, Int8Weight, PlacedTensor, header_entries
from int8convert.formats.layers import CONV1D_NAMES
from int8convert.formats.modules import module_of
from int8convert.formats.transforms import rotated_inputs
from int8convert.planning.plan import ConversionPlan, PlannedShard, PlannedTensor
from int8convert.text import quoted

_COPIED = "not int8 in the source"
_CODES = "int8 codes"
_SCALE = "belongs to int8 codes"
_DEQUANTIZED = "dequantized"

Unit = list[PlannedTensor]
"""The tensors that are made of one weight, or one other tensor. They go into one shard."""


@dataclass(frozen=True, slots=True)
class Target:
    """The form that int8 weights get.

    Attributes:
        source_format: their format in the source.
        format: their format in the output; None if they are dequantized.
        dtype: the dtype they are dequantized to, as safetensors names it; "" otherwise.
    """

    source_format: Format
    format: Format | None
    dtype: str = ""

    @property
    def is_copy(self) -> bool:
        """Whether all tensors are copied unchanged."""
        return self.format is self.source_format

    @property
    def name(self) -> str:
        """The format, or the dtype as config.json spells it."""
        return str(self.format) if self.format else _dtype_name(self.dtype)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The plan of an export.

    Attributes:
        config: the output's config.json.
        n_parameters: elements of all tensors but scales.
        n_int8_weights: weights of modules that are int8 in the source.
        n_changed_scales: rows whose scale the output's format cannot hold exactly, see `formats.scales`.
    """

    source: CheckpointSource = field(repr=False)
    target: Target
    shards: tuple[PlannedShard, ...]
    config: dict[str, Any] = field(repr=False)
    n_parameters: int
    n_int8_weights: int
    n_changed_scales: int
    notes: tuple[str, ...]

    model_class = None  # an export asks no class of transformers
    coverage = None  # an export quantizes nothing

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def n_read_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(shard.n_read_bytes for shard in self.shards)

    @property
    def n_written_bytes(self) -> int:
        """Bytes of the shards, headers included."""
        return sum(shard.n_bytes for shard in self.shards)


ShardedPlan = ConversionPlan | ExportPlan
"""What the conversion obeys: the shards of an output, made of the tensors of a source."""


def make_export_plan(checkpoint: Int8Checkpoint, target: Target, max_shard_bytes: int | None = None) -> ExportPlan:
    """Plan one output shard for each source shard, or shards of at most `max_shard_bytes`.

    A weight larger than `max_shard_bytes` gets a shard to itself.

    Raises:
        FormatError: no loader of the target's format could read this model.
        CorruptFileError: two tensors would get the same name.
        SourceError: a file with scales cannot be read.
    """
    if rotated_inputs(checkpoint.source.config[BLOCK]):
        raise FormatError(
            f"{quoted(checkpoint.source.label, 200)} rotates inputs while the model runs, which no other format does",
            "convert its source again without --rotate-inputs, and export that",
        )
    _check_target(checkpoint, target)
    entries = header_entries(checkpoint, target.format) if target.format else {}
    metadata: TensorSpecs = {METADATA_NAME: FileMetadata(entries)} if entries else {}
    groups = _group(checkpoint, target, max_shard_bytes)
    _check_unique(groups)
    place = {shard.path: i for i, shard in enumerate(checkpoint.source.shards)}
    shards = []
    for i, group in enumerate(groups):
        tensors = [tensor for unit in group for tensor in unit]
        specs = {name: spec for tensor in tensors for name, spec in tensor.output_specs().items()}
        outputs = order_for_alignment({**metadata, **specs})
        # In the order of the source's bytes, so that one stream of each shard suffices.
        tensors.sort(key=lambda tensor: (place[tensor.shard.path], tensor.source.offset))
        shards.append(PlannedShard(shard_name(i, len(groups)), tuple(tensors), outputs, planned_shard_bytes(outputs)))
    codes = [item.codes if isinstance(item, Int8Weight) else item for item in checkpoint.items]
    return ExportPlan(
        source=checkpoint.source,
        target=target,
        shards=tuple(shards),
        config=exported_config(checkpoint, target),
        n_parameters=sum(tensor.stored.n_elements for tensor in codes),
        n_int8_weights=len(checkpoint.weights),
        n_changed_scales=_count_changed(checkpoint, target),
        notes=(*checkpoint.source.notes, *_notes(checkpoint, target)),
    )


def _group(checkpoint: Int8Checkpoint, target: Target, max_shard_bytes: int | None) -> list[list[Unit]]:
    groups: list[list[Unit]] = []
    group_bytes = 0
    shard = None
    for item in checkpoint.items:
        unit = _weight_unit(item, target) if isinstance(item, Int8Weight) else [_copy(item, target, _COPIED)]
        n_bytes = sum(tensor.output_bytes for tensor in unit)
        home = item.codes.shard if isinstance(item, Int8Weight) else item.shard
        begins_next = home is not shard if max_shard_bytes is None else group_bytes + n_bytes > max_shard_bytes
        if begins_next or not groups:
            groups.append([])
            group_bytes = 0
        shard = home
        groups[-1].append(unit)
        group_bytes += n_bytes
    return groups


def _weight_unit(weight: Int8Weight, target: Target) -> Unit:
    if target.is_copy:
        beside = (replace(_copy(part, target, _SCALE), is_beside_codes=True) for part in weight.parts[1:])
        return [_copy(weight.codes, target, _CODES), *beside]
    if target.format is None:
        return [_dequantized(weight, target)]
    names = module_of(target.format).NAMES.under(weight.module_name)
    codes = replace(_copy(weight.codes, target, _CODES), output_name=names.codes)
    stored, shard = weight.scale.stored, weight.scale.shard
    scale = PlannedTensor(
        stored,
        shard,
        names.scale,
        "F32",
        _SCALE,
        target.format,
        source_format=target.source_format,
        is_beside_codes=True,
    )
    return [codes, scale]


def _copy(tensor: PlacedTensor, target: Target, reason: str) -> PlannedTensor:
    format = target.format or target.source_format
    return PlannedTensor(tensor.stored, tensor.shard, tensor.name, tensor.stored.dtype, reason, format)


def _dequantized(weight: Int8Weight, target: Target) -> PlannedTensor:
    stored, source_format = weight.codes.stored, target.source_format
    if weight.is_transposed:
        rows, columns = stored.shape
        stored = replace(stored, shape=(columns, rows), strides=(1, columns))
    coding = Int8Coding(weight.scale, source_format, weight.is_transposed)
    name = f"{weight.module_name}.weight"
    return PlannedTensor(
        stored, weight.codes.shard, name, target.dtype, _DEQUANTIZED, source_format, coding, source_format=source_format
    )


def _count_changed(checkpoint: Int8Checkpoint, target: Target) -> int:
    if target.is_copy or target.format is None:
        return 0
    source, module = module_of(target.source_format), module_of(target.format)
    n_changed = 0
    for weight in checkpoint.weights:
        scale = source.to_scale(Int8Coding(weight.scale, target.source_format).read_scale())
        n_changed += int(np.count_nonzero(module.to_scale(module.from_scale(scale)) != scale))
    return n_changed


def _check_unique(groups: list[list[Unit]]) -> None:
    seen: set[str] = set()
    for tensor in (tensor for group in groups for unit in group for tensor in unit):
        for name in tensor.output_specs():
            if name in seen:
                raise CorruptFileError(
                    f"two tensors of the source would both be written as {quoted(name)}",
                    "the checkpoint holds the same weights twice",
                )
            seen.add(name)


def _check_target(checkpoint: Int8Checkpoint, target: Target) -> None:
    if target.is_copy or target.format is None:
        return
    source, module = module_of(checkpoint.format), module_of(target.format)
    conv1d = next((weight for weight in checkpoint.weights if weight.is_transposed), None)
    if conv1d is not None and not (source.HOLDS_CONV1D and module.HOLDS_CONV1D):
        raise FormatError(
            f"{target.format} has no form for Conv1D layers such as {quoted(conv1d.module_name)}: "
            "its loaders know int8 weights of Linear layers only",
            "keep the bitsandbytes format, or pass --dequantize",
        )
    expert = next((weight for weight in checkpoint.weights if weight.is_expert), None)
    if expert is not None and not module.HOLDS_EXPERTS:
        raise FormatError(
            f"{target.format} cannot hold int8 experts such as {quoted(expert.module_name)}: "
            "transformers fuses experts into one parameter, for which it has no int8 form",
            "keep compressed-tensors, which vLLM serves, or pass --dequantize",
        )


def exported_config(checkpoint: Int8Checkpoint, target: Target) -> dict[str, Any]:
    """Return the config.json of an export. `verify` compares the one that is there with it."""
    config = checkpoint.source.config
    if target.is_copy:
        return config
    if target.format is None:
        return plain_config(config, _dtype_name(target.dtype))
    threshold = read_threshold(config, OUTLIER_THRESHOLD)
    return int8_config(config, target.format, checkpoint.dtype, checkpoint.skip_modules(), threshold)


def _dtype_name(dtype: str) -> str:
    return next(name for name, stored in DTYPES.items() if stored == dtype)


def _notes(checkpoint: Int8Checkpoint, target: Target) -> tuple[str, ...]:
    """Return notes on what headers cannot tell."""
    names = (weight.module_name for weight in checkpoint.weights if not weight.is_transposed)
    doubtful = next((name for name in names if name.rpartition(".")[2] in CONV1D_NAMES), None)
    if target.is_copy or doubtful is None or "auto_map" not in checkpoint.source.config:
        return ()
    return (f"the model's own code is not looked at: '{doubtful}' and the like are taken for Linear, not Conv1D",)
