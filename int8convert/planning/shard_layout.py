"""Lays the tensors of a checkpoint out into output shards, by its model map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from int8convert.checkpoint.names import shard_name
from int8convert.checkpoint.shard_writer import order_for_alignment, planned_shard_bytes
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor, contiguous_strides
from int8convert.decoding.coding import CodedWeight, Coding, Rows
from int8convert.decoding.fp8 import FP8_DTYPES
from int8convert.decoding.source_weights import SourceWeights, find_weights
from int8convert.errors import AdapterError, CorruptFileError
from int8convert.formats.format import Format, TensorSpecs
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.modules import module_of
from int8convert.planning.adapters.adapter import Adapter
from int8convert.planning.adapters.adapter_placement import AdapterPlacement, BaseTensor, place_adapter
from int8convert.planning.adapters.lora import LoraDelta
from int8convert.planning.expert_layouts import ExpertLayout, split
from int8convert.planning.fold import Fold
from int8convert.planning.folding.folding import Folding
from int8convert.planning.model_map.model_map import Action, MappedTensor, ModelMap
from int8convert.planning.plan import ConversionPlan, PlannedShard, PlannedTensor
from int8convert.text import quoted


def make_plan(
    source: CheckpointSource,
    model_map: ModelMap,
    max_shard_bytes: int | None = None,
    adapter: Adapter | None = None,
    folding: Folding | None = None,
    rounds_to: str | None = None,
) -> ConversionPlan:
    """Lay the checkpoint's tensors out into output shards.

    One output shard for each input shard; with `max_shard_bytes`, tensors in the source's order, a new shard where the
    next would not fit. A single tensor larger than that gets a shard to itself.

    Args:
        rounds_to: the dtype that decoded weights are rounded to first; None rounds none.

    Raises:
        CorruptFileError: two tensors would be written under one name, or codes have no fitting scale.
        AdapterError: the adapter is for another model.
    """
    groups: list[list[PlannedTensor]] = []
    dropped: dict[str, str] = {}
    weights = find_weights(source)
    placement = _place(adapter, source, weights, model_map) if adapter is not None else None
    seen: set[str] = set()
    group_bytes = 0
    for shard in source.shards:
        if max_shard_bytes is None or not groups:
            groups.append([])
        for stored in shard.tensors:
            coded = weights.by_codes.get(stored.name)
            source_name = coded.name if coded else stored.name
            mapped = None if weights.is_dropped(stored.name) else model_map.tensors.get(source_name)
            if mapped is None or mapped.action is Action.DROP:
                dropped[stored.name] = mapped.reason if mapped else "decoded with the quantized weight it belongs to"
                continue
            if folding and folding.is_overlooked(source_name):
                dropped[stored.name] = "loaders take the embedding in its place"
                continue
            lora = placement.deltas.get(source_name) if placement else None
            place = shard
            if placement and source_name in placement.replacements:
                stored, place, coded = placement.replacements[source_name], placement.adapter.shard, None
            for view, coding, piece, fold in _pieces(stored, coded, mapped, folding, source_name):
                fold = _with_adapter_gain(fold, placement) if fold and placement else fold
                tensor = _plan_tensor(view, place, piece, model_map.output_format, coding, lora)
                tensor = replace(tensor, fold=fold) if fold else tensor
                is_decoded = coding is not None or view.dtype in FP8_DTYPES
                tensor = replace(tensor, rounds_to=rounds_to) if rounds_to and is_decoded else tensor
                _check_unique(tensor, seen)
                if max_shard_bytes is not None and groups[-1] and group_bytes + tensor.output_bytes > max_shard_bytes:
                    groups.append([])
                    group_bytes = 0
                groups[-1].append(tensor)
                group_bytes += tensor.output_bytes
    groups = [group for group in groups if group]
    names = (shard_name(i, len(groups)) for i in range(len(groups)))
    shards = tuple(_plan_shard(name, group) for name, group in zip(names, groups, strict=True))
    return ConversionPlan(source, model_map, shards, dropped, folding)


def _check_unique(tensor: PlannedTensor, seen: set[str]) -> None:
    """Refuse a name that is written twice, or that the loader would read as part of another tensor's int8 weight.

    Args:
        seen: names of the earlier tensors, and those beside their int8 weights; this tensor's are added.
    """
    written = set(tensor.output_specs())
    beside = set(module_of(tensor.format).names_beside(tensor.output_name)) if tensor.is_quantized else set()
    for name in sorted(written | beside):
        if name in seen:
            raise CorruptFileError(
                f"two tensors of the source would both be written as {quoted(name)}, or read as part of one int8 "
                f"weight; one of them is {quoted(tensor.source.name)}",
                "the checkpoint holds the same weights twice, or quantized ones",
            )
    seen |= written | beside


def _pieces(
    stored: StoredTensor, coded: CodedWeight | None, mapped: MappedTensor, folding: Folding | None, source_name: str
) -> Iterator[tuple[StoredTensor, Coding | None, MappedTensor, Fold | None]]:
    """Yield the tensor itself, and the head that shares it and must not; or the matrices or biases of its experts.

    Args:
        coded: the weight whose codes `stored` holds; None for floats.
        source_name: its name in the source; an adapter's tensor that replaces it has another.
    """
    if mapped.experts is None:
        coding = coded.whole() if coded else None
        stored = replace(coded.codes.stored, name=coded.name) if coded else stored
        yield stored, coding, mapped, folding.fold_of(source_name, mapped.action) if folding else None
        if folding and folding.untied_head and (head := folding.head(source_name, mapped)):
            yield stored, coding, head, folding.untied_head.fold
        return
    is_weight = mapped.experts.leaf == "weight"
    action, reason = (Action.QUANTIZE, "") if is_weight else (Action.KEEP, "not a matrix product")
    for name, view, coding in _split_coded(mapped.experts, coded) if coded else _split(mapped.experts, stored):
        yield view, coding, MappedTensor(action, reason, name, mapped.output_dtype), None


def _split(layout: ExpertLayout, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor, None]]:
    return ((name, view, None) for name, view in split(layout, stored))


def _split_coded(layout: ExpertLayout, coded: CodedWeight) -> Iterator[tuple[str, StoredTensor, Coding]]:
    """Yield output name, codes and coding of each matrix of a fused weight, whose codes are [experts, out, ..]."""
    if layout.is_transposed is not coded.is_transposed or len(coded.shape) != 3:
        raise CorruptFileError(
            f"the quantized experts {quoted(coded.codes.name)} are stored the other way round than the model has them",
            "convert the 16-bit version of the checkpoint",
        )
    n_experts, n_out, _ = coded.codes.stored.shape
    # The rows of each matrix are those of a tensor of one byte a row.
    numbers = StoredTensor(coded.name, "U8", (n_experts, n_out, 1), 0)
    for name, view in split(replace(layout, is_transposed=False), numbers):
        codes, coding = coded.piece(Rows(view.offset, view.strides[0] if view.strides else 1, view.shape[0]))
        yield name, replace(codes, name=coded.name), coding


def _with_adapter_gain(fold: Fold, placement: AdapterPlacement) -> Fold:
    """Return the fold with the gain of the adapter's norm, if the adapter replaces the norm."""
    if fold.gain is None or fold.gain.weight.name not in placement.replacements:
        return fold
    weight = PlacedTensor(placement.replacements[fold.gain.weight.name], placement.adapter.shard)
    return replace(fold, gain=replace(fold.gain, weight=weight))


def _plan_tensor(
    stored: StoredTensor,
    shard: SourceShard,
    mapped: MappedTensor,
    output_format: Format,
    coding: Coding | None,
    lora: LoraDelta | None,
) -> PlannedTensor:
    if mapped.action is Action.QUANTIZE_TRANSPOSED and coding is not None:
        raise CorruptFileError(
            f"{quoted(stored.name)} is quantized along the outputs of a Conv1D layer, whose rows would mix scales",
            "convert the 16-bit version of the checkpoint",
        )
    if mapped.action is Action.QUANTIZE_TRANSPOSED:
        rows, columns = stored.shape
        row_stride, column_stride = stored.strides or contiguous_strides(stored.shape)
        stored = replace(stored, shape=(columns, rows), strides=(column_stride, row_stride))
    return PlannedTensor(
        stored, shard, mapped.output_name, mapped.output_dtype, mapped.reason, output_format, coding, lora
    )


def _place(adapter: Adapter, source: CheckpointSource, weights: SourceWeights, model_map: ModelMap) -> AdapterPlacement:
    loaded = (weights.as_loaded(tensor) for tensor in source.tensors if not weights.is_dropped(tensor.name))
    shapes = {tensor.name: tensor.shape for tensor in loaded}
    if not model_map.parameters:
        raise AdapterError(
            "the model's class is unknown, so which tensors the adapter changes is unknown too",
            "merge it with PEFT, and convert the merged checkpoint",
        )
    bases = {
        name: BaseTensor(key, shapes[key], is_transposed) for name, (key, is_transposed) in model_map.parameters.items()
    }
    mapped = {base.name for base in bases.values()}
    # What is merged on loading has no parameter of its own; adapters from before that name it as the checkpoint does.
    bases |= {key: BaseTensor(key, shape) for key, shape in shapes.items() if key not in mapped}
    return place_adapter(adapter, bases)


def _plan_shard(file_name: str, tensors: Iterable[PlannedTensor]) -> PlannedShard:
    group = tuple(tensors)
    specs: TensorSpecs = {}
    for tensor in group:
        specs.update(tensor.output_specs())
    outputs = order_for_alignment(specs)
    return PlannedShard(file_name, group, outputs, planned_shard_bytes(outputs))
