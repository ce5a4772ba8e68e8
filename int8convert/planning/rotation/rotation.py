"""The rotation of a checkpoint: which fold goes into which stored tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import ModelMapError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.transforms import BLOCK_SIZE
from int8convert.planning.fold import Fold, Gain
from int8convert.planning.model_map.model_map import Action, MappedTensor, ModelMap, ModuleFilter
from int8convert.planning.model_map.process import worker_request
from int8convert.runtime.worker_process import Worker, WorkerError
from int8convert.text import quoted

_INPUTS_NOTE = (
    "inputs are rotated while the model runs, which int8convert and vLLM on one GPU do; transformers would compute "
    "something else"
)
_HINT = "convert without --rotate"


@dataclass(frozen=True, slots=True)
class UntiedHead:
    """A head that had the embedding's weight, and gets one of its own.

    Attributes:
        source_name: the embedding's weight.
        own_name: the tensor that the source holds for the head, which loaders overlook; "" if there is none.
        output_name: the name of the head's weight.
    """

    source_name: str
    own_name: str
    output_name: str
    fold: Fold = field(repr=False)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The folds of one checkpoint.

    Attributes:
        folds: source name -> the fold of the tensor as [out, in], and whether it is stored [in, out]. An input that is
            rotated while the model runs is in the fold of an int8 weight alone.
        untied_head: None if the head keeps its weight.
        notes: what is not rotated, and why; which loaders rotate inputs.
    """

    folds: Mapping[str, tuple[Fold, bool]] = field(repr=False)
    untied_head: UntiedHead | None
    notes: tuple[str, ...]

    def fold_of(self, source_name: str, action: Action) -> Fold | None:
        """Return the fold of a tensor as it is read for an action; None if there is none."""
        if source_name not in self.folds:
            return None
        fold, is_transposed = self.folds[source_name]
        if action is not Action.QUANTIZE:
            fold = replace(fold, input_block=1)
        return fold.transposed() if is_transposed and action is not Action.QUANTIZE_TRANSPOSED else fold

    def config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the source's config.json for the rotated model."""
        return {**config, "tie_word_embeddings": False} if self.untied_head else config

    def head(self, source_name: str, mapped: MappedTensor) -> MappedTensor | None:
        """Return what an untied head becomes, if this is the tensor it is made of."""
        if self.untied_head is None or self.untied_head.source_name != source_name:
            return None
        reason = "output head, no longer tied"
        return MappedTensor(Action.KEEP, reason, self.untied_head.output_name, mapped.output_dtype)

    def is_overlooked(self, source_name: str) -> bool:
        return self.untied_head is not None and self.untied_head.own_name == source_name


def find_rotation(
    source: CheckpointSource, model_map: ModelMap, trusts_code: bool, rotates_inputs: bool = False
) -> Rotation:
    """Find the rotation of a checkpoint in a child process, which proves it on a small model of the same class.

    Args:
        rotates_inputs: let the loader rotate further inputs while the model runs.

    Raises:
        ModelMapError: the model allows none, or its class is unknown.
    """
    if not model_map.parameters:
        raise ModelMapError("the model's class is unknown, so it cannot be rotated", _HINT)
    request = worker_request(source, ModuleFilter(trusts_code=trusts_code))
    worker = Worker("int8convert.planning.rotation.worker")
    try:
        found = worker.result(request)
    except WorkerError as error:
        raise ModelMapError(f"the model cannot be rotated: {error.exception}: {error.message}", _HINT) from error
    finally:
        worker.stop()
    if not rotates_inputs:
        found["inputs"] = []
    if not (found["folds"] or found["inputs"]):
        raise ModelMapError(f"the model cannot be rotated: {'; '.join(found['refusals'])}", _HINT)
    return _placed(source, model_map, found)


def _placed(source: CheckpointSource, model_map: ModelMap, found: Mapping[str, Any]) -> Rotation:
    """Return the folds of the child's answer by the names of the source."""
    places = {tensor.name: PlacedTensor(tensor, shard) for shard in source.shards for tensor in shard.tensors}

    def key(parameter: str) -> str:
        if parameter not in model_map.parameters:
            raise ModelMapError(f"the model cannot be rotated: the checkpoint holds no {quoted(parameter)}", _HINT)
        return model_map.parameters[parameter][0]

    def fold(fields: Mapping[str, Any]) -> Fold:
        gain = Gain(places[key(f"{fields['gain']}.weight")], fields["offset"]) if fields["gain"] else None
        blocks = fields["row_block"], fields["column_block"]
        return Fold(gain, fields["divides"], fields["divides"], *blocks, fields["constant"])

    by_parameter = {fields["parameter"]: fields for fields in found["folds"]}
    head = None
    if found["untied"] is not None:
        name, embedding = found["untied"]
        own, shared = key(name), key(embedding)
        head = UntiedHead(shared, own if own != shared else "", name, fold(by_parameter.pop(name)))
    folds = {key(name): (fold(fields), model_map.parameters[name][1]) for name, fields in by_parameter.items()}
    for name in (key(f"{name}.weight") for names in found["inputs"] for name in names):
        before, is_transposed = folds.get(name, (Fold(), False))
        folds[name] = replace(before, input_block=BLOCK_SIZE), is_transposed
    notes = (*found["refusals"], *([_INPUTS_NOTE] if found["inputs"] else []))
    return Rotation(folds, head, notes)
