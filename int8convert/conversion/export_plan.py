"""What an export will write: shards, their tensors, config.json; and what is refused because no loader could read it.

Pure, from headers and config. Nothing here reads weights or writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from int8convert.checkpoint.names import shard_name
from int8convert.checkpoint.safetensors_file import METADATA_NAME, FileMetadata
from int8convert.checkpoint.shard_writer import order_for_alignment, planned_shard_bytes
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES
from int8convert.conversion.export_tensors import Target
from int8convert.conversion.quantize import DEFAULT_THRESHOLD
from int8convert.errors import CorruptFileError, FormatError
from int8convert.formats.config import int8_config, plain_config, read_threshold
from int8convert.formats.format import TensorSpecs
from int8convert.formats.int8_checkpoint import DTYPES, Int8Checkpoint, Int8Weight, PlacedTensor, header_entries
from int8convert.formats.layers import CONV1D_NAMES
from int8convert.formats.modules import module_of
from int8convert.text import quoted

Item = Int8Weight | PlacedTensor


@dataclass(frozen=True, slots=True)
class ExportedShard:
    """One output file.

    Attributes:
        items: in the order they are read.
        outputs: what the file holds, in the order of its bytes.
        n_bytes: of the file, header included.
    """

    file_name: str
    items: tuple[Item, ...] = field(repr=False)
    outputs: TensorSpecs = field(repr=False)
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The whole export.

    Attributes:
        config: the output's config.json.
        n_parameters: elements of all tensors but scales.
    """

    source: CheckpointSource = field(repr=False)
    target: Target
    shards: tuple[ExportedShard, ...]
    config: dict[str, Any] = field(repr=False)
    n_parameters: int
    notes: tuple[str, ...]

    @property
    def n_written_bytes(self) -> int:
        """Bytes of the shards, headers included."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_n_bytes(shard.outputs) for shard in self.shards)


def make_export_plan(checkpoint: Int8Checkpoint, target: Target, max_shard_bytes: int | None = None) -> ExportPlan:
    """Lay the output out: one shard for each of the source's, or as many as `max_shard_bytes` makes.

    A weight's tensors stay together. A single one larger than `max_shard_bytes` gets a shard to itself.

    Raises:
        FormatError: no loader of the target's format could read this model.
        CorruptFileError: two tensors would get one name.
    """
    _check_target(checkpoint, target)
    entries = header_entries(checkpoint, target.format) if target.format is not None else {}
    metadata = {METADATA_NAME: FileMetadata(entries)} if entries else {}
    groups = _group(checkpoint.items, target, max_shard_bytes)
    shards = []
    seen: set[str] = set()
    for i, group in enumerate(groups):
        specs: TensorSpecs = {}
        for item in group:
            for name, spec in target.output_specs(item).items():
                _check_unique(name, seen)
                specs[name] = spec
        outputs = order_for_alignment({**metadata, **specs})
        shards.append(ExportedShard(shard_name(i, len(groups)), tuple(group), outputs, planned_shard_bytes(outputs)))
    n_parameters = sum(
        item.codes.stored.n_elements if isinstance(item, Int8Weight) else item.stored.n_elements
        for item in checkpoint.items
    )
    config = exported_config(checkpoint, target)
    return ExportPlan(checkpoint.source, target, tuple(shards), config, n_parameters, _notes(checkpoint, target))


def _group(items: Iterable[Item], target: Target, max_shard_bytes: int | None) -> list[list[Item]]:
    groups: list[list[Item]] = []
    group_bytes = 0
    shard = None
    for item in items:
        n_bytes = _n_bytes(target.output_specs(item))
        home = item.codes.shard if isinstance(item, Int8Weight) else item.shard
        begins_anew = home is not shard if max_shard_bytes is None else group_bytes + n_bytes > max_shard_bytes
        if begins_anew or not groups:
            groups.append([])
            group_bytes = 0
        shard = home
        groups[-1].append(item)
        group_bytes += n_bytes
    return groups


def _n_bytes(specs: TensorSpecs) -> int:
    return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in specs.values())


def _check_unique(name: str, seen: set[str]) -> None:
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
    """Return the config.json of an export; `verify` compares what is there with it."""
    config = checkpoint.source.config
    if target.is_copy:
        return config
    if target.format is None:
        spelled = {stored: name for name, stored in DTYPES.items()}
        return plain_config(config, spelled[target.dtype])
    threshold = read_threshold(config, DEFAULT_THRESHOLD)
    return int8_config(config, target.format, checkpoint.dtype, checkpoint.skip_modules(), threshold)


def _notes(checkpoint: Int8Checkpoint, target: Target) -> tuple[str, ...]:
    """What the user should know of what headers cannot tell."""
    names = (weight.module_name for weight in checkpoint.weights if not weight.is_transposed)
    doubtful = next((name for name in names if name.rpartition(".")[2] in CONV1D_NAMES), None)
    if target.is_copy or doubtful is None or "auto_map" not in checkpoint.source.config:
        return ()
    return (f"the model's own code is not looked at: '{doubtful}' and the like are taken for Linear, not Conv1D",)
