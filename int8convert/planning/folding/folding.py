"""Finds which rotation and smoothing folds go into which stored tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.source_weights import find_weights
from int8convert.errors import CorruptFileError, ModelMapError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.transforms import BLOCK_SIZE
from int8convert.planning.fold import Fold, Gain
from int8convert.planning.model_map.model_map import Action, MappedTensor, ModelMap, ModuleFilter
from int8convert.planning.model_map.process import worker_request
from int8convert.planning.smoothing import SmoothGroup, Smoothing, SmoothingFactors
from int8convert.runtime.worker_process import Worker, WorkerError
from int8convert.text import quoted

_INPUTS_NOTE = (
    "OUT needs a loader that rotates inputs while the model runs: int8convert.load, or vLLM on one GPU; transformers "
    "would compute something else"
)


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
class Folding:
    """The folds of one checkpoint.

    Attributes:
        folds: source name -> the fold of the tensor as [out, in], and whether it is stored [in, out]. An input that is
            rotated while the model runs is in the fold of an int8 weight alone.
        untied_head: None if the head keeps its weight.
        notes: what is not rotated or not smoothed, and why; which loaders rotate inputs.
        smooth_groups: the groups that may be smoothed.
        factors: those of the groups that are; None if they are not chosen yet, or if nothing is smoothed.
    """

    folds: Mapping[str, tuple[Fold, bool]] = field(repr=False)
    untied_head: UntiedHead | None
    notes: tuple[str, ...]
    smooth_groups: tuple[SmoothGroup, ...] = ()
    factors: SmoothingFactors | None = None

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


@dataclass(frozen=True, slots=True)
class WantedFolds:
    """The folds that a user asks for.

    Attributes:
        rotates: fold a rotation.
        rotates_inputs: fold a rotation, and let the loader rotate further inputs while the model runs.
        smoothing: fold factors, as far as they are chosen; None folds none.
    """

    rotates: bool
    rotates_inputs: bool
    smoothing: Smoothing | None

    def to_json(self) -> dict[str, bool]:
        rotates = self.rotates or self.rotates_inputs
        return {"rotates": rotates, "rotates_inputs": self.rotates_inputs, "smooths": self.smoothing is not None}


def find_folds(source: CheckpointSource, model_map: ModelMap, trusts_code: bool, wanted: WantedFolds) -> Folding:
    """Find the folds of a checkpoint in a child process, which proves them on a small model of the same class.

    Raises:
        ModelMapError: the model allows none, or its class is unknown.
        CorruptFileError: the factors are of another model.
    """
    asked = wanted.to_json()
    hint = f"convert without {'--rotate' if asked['rotates'] else '--smooth'}"
    if not model_map.parameters:
        raise ModelMapError("the model's class is unknown, so it cannot be rotated or smoothed", hint)
    request = worker_request(source, ModuleFilter(trusts_code=trusts_code))
    worker = Worker("int8convert.planning.folding.worker")
    try:
        found = worker.result({**request, **asked})
    except WorkerError as error:
        raise ModelMapError(
            f"the model cannot be rotated or smoothed: {error.exception}: {error.message}", hint
        ) from error
    finally:
        worker.stop()
    if asked["rotates"] and not (found["rotation"]["folds"] or found["rotation"]["inputs"]):
        raise ModelMapError(f"the model cannot be rotated: {'; '.join(found['rotation']['refusals'])}", hint)
    smoothing = wanted.smoothing
    if smoothing is not None and not found["smoothing"]["groups"]:
        refusals = found["smoothing"]["refusals"] or ["all that could be smoothed is rotated"]
        raise ModelMapError(f"the model cannot be smoothed: {'; '.join(refusals)}", "convert without --smooth")
    groups = [SmoothGroup(**{**group, "readers": tuple(group["readers"])}) for group in found["smoothing"]["groups"]]
    factors = smoothing.factors if smoothing is not None else None
    if smoothing is not None and factors is not None:
        _check_factors(smoothing, factors, groups)
    return _Placing(source, model_map, factors, hint).place(found, groups)


def _check_factors(smoothing: Smoothing, factors: SmoothingFactors, groups: Iterable[SmoothGroup]) -> None:
    sizes = {group.name: group.size for group in groups}
    for name, values in factors.by_group.items():
        if sizes.get(name) != len(values):
            raise CorruptFileError(
                f"'{smoothing.path}' holds {len(values):,} factors for {quoted(name)}, the model has "
                f"{sizes.get(name, 0):,}",
                "pass the file that was made for this model",
            )


@dataclass(frozen=True, slots=True)
class _Placing:
    """Gives the folds of the child's answer the names of the source."""

    source: CheckpointSource
    model_map: ModelMap
    factors: SmoothingFactors | None
    hint: str

    def place(self, found: Mapping[str, Any], groups: Iterable[SmoothGroup]) -> Folding:
        weights = find_weights(self.source)
        loaded = ((weights.as_loaded(tensor), shard) for shard in self.source.shards for tensor in shard.tensors)
        places = {tensor.name: PlacedTensor(tensor, shard) for tensor, shard in loaded}
        by_parameter = {fields["parameter"]: self._fold(fields, places) for fields in found["folds"]}
        head = None
        if found["rotation"]["untied"] is not None:
            name, embedding = found["rotation"]["untied"]
            own, shared = self._key(name), self._key(embedding)
            head = UntiedHead(shared, own if own != shared else "", name, by_parameter.pop(name))
        parameters = self.model_map.parameters
        folds = {self._key(name): (fold, parameters[name][1]) for name, fold in by_parameter.items() if fold != Fold()}
        for name in (f"{name}.weight" for names in found["rotation"]["inputs"] for name in names):
            before, is_transposed = folds.get(self._key(name), (Fold(), False))
            folds[self._key(name)] = replace(before, input_block=BLOCK_SIZE), is_transposed
        refusals = (*found["rotation"]["refusals"], *found["smoothing"]["refusals"])
        notes = (*refusals, *([_INPUTS_NOTE] if found["rotation"]["inputs"] else []))
        return Folding(folds, head, notes, tuple(groups), self.factors)

    def _key(self, parameter: str) -> str:
        if parameter not in self.model_map.parameters:
            raise ModelMapError(
                f"the model cannot be rotated or smoothed: the checkpoint holds no {quoted(parameter)}", self.hint
            )
        return self.model_map.parameters[parameter][0]

    def _fold(self, fields: Mapping[str, Any], places: Mapping[str, PlacedTensor]) -> Fold:
        gain = None
        if fields["gain"]:
            gain = Gain(places[self._key(f"{fields['gain']}.weight")], fields["offset"])
        key = self._key(fields["parameter"])
        is_transposed = self.model_map.parameters[fields["parameter"]][1]
        n_columns = places[key].stored.shape[0 if is_transposed else -1]
        factors = self.factors or SmoothingFactors({})
        row_factors = factors.of_rows(fields["row_factors"])
        return Fold(
            gain,
            gain_of_rows=fields["divides"],
            divides=fields["divides"],
            row_block=fields["row_block"],
            column_block=fields["column_block"],
            constant=fields["constant"],
            row_factors=row_factors,
            column_factors=factors.of_columns(fields["column_factors"], n_columns, fields["head"]),
            offset=fields["offset"] if row_factors and not gain else 0.0,
        )
