"""Plans a conversion: maps the model in a child process, lays out the shards, and adds notes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from int8convert.checkpoint.loaders.notes import note_adapter
from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.source_weights import check_unscaled
from int8convert.planning.adapters.adapter import Adapter
from int8convert.planning.calibrated_rounding import RoundingCalibration, round_by
from int8convert.planning.coverage import check_coverage, coverage_note
from int8convert.planning.folding.folding import WantedFolds, find_folds
from int8convert.planning.model_map.model_map import ModelMap, ModuleFilter
from int8convert.planning.model_map.process import ModelMapProcess
from int8convert.planning.needs import check_needs, needs_notes
from int8convert.planning.plan import ConversionPlan
from int8convert.planning.shard_layout import make_plan
from int8convert.planning.smoothing import Smoothing


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The input of a plan.

    Attributes:
        max_shard_bytes: largest output shard; None makes one for each source shard.
        adapter: merged into the weights.
        kept_modules: modules whose weights turned out to have no int8 form.
        rotates: fold a rotation into the weights.
        rotates_inputs: also let the loader rotate further inputs while the model runs.
        rounding: the calibration by which codes are chosen; None rounds to nearest.
        rounds_to: the dtype, as safetensors names it, that decoded weights are rounded to first; None rounds none.
        smoothing: fold factors into the weights; None folds none. Without factors, the plan names the groups alone.
    """

    source: CheckpointSource
    modules: ModuleFilter
    max_shard_bytes: int | None = None
    adapter: Adapter | None = None
    kept_modules: tuple[str, ...] = ()
    rotates: bool = False
    rotates_inputs: bool = False
    rounding: RoundingCalibration | None = None
    smoothing: Smoothing | None = None
    rounds_to: str | None = None


def plan_conversion(request: PlanRequest) -> ConversionPlan:
    """Map the model in a child process, which takes seconds, and plan by the map.

    Raises:
        Int8ConvertError: transformers cannot map the model, or the checkpoint contradicts the map.
    """
    source, modules, adapter = request.source, request.modules, request.adapter
    process = ModelMapProcess(source, replace(modules, skip=(*modules.skip, *request.kept_modules)))
    try:
        found = _with_reason(process.result(), request.kept_modules)
    finally:
        process.stop()
    check_unscaled(source, found.linears)
    folding = None
    if request.rotates or request.rotates_inputs or request.smoothing is not None:
        wanted = WantedFolds(request.rotates, request.rotates_inputs, request.smoothing)
        folding = find_folds(source, found, modules.trusts_code, wanted)
    refused = folding.notes if folding else ()
    notes = (*found.notes, *source.notes, *_adapter_notes(source, adapter), *needs_notes(found, source), *refused)
    made = make_plan(source, replace(found, notes=notes), request.max_shard_bytes, adapter, folding, request.rounds_to)
    made = replace(made, took_child=process.starts_child or folding is not None)
    return _with_note(round_by(made, request.rounding) if request.rounding else made)


def _adapter_notes(source: CheckpointSource, adapter: Adapter | None) -> Iterator[str]:
    if source.has_adapter:
        is_merged = adapter is not None and os.path.realpath(adapter.directory) == os.path.realpath(source.directory)
        yield note_adapter(source.commit is not None, is_merged)


def _with_note(plan: ConversionPlan) -> ConversionPlan:
    note = coverage_note(plan)
    if note is None:
        return plan
    return replace(plan, model_map=replace(plan.model_map, notes=(*plan.model_map.notes, note)))


def _with_reason(model_map: ModelMap, kept_modules: tuple[str, ...]) -> ModelMap:
    tensors = {
        name: replace(mapped, reason="not finite in int8")
        if mapped.output_name.removesuffix(".weight") in kept_modules
        else mapped
        for name, mapped in model_map.tensors.items()
    }
    notes = tuple(f"'{name}' stays 16-bit: its weights are not finite in int8" for name in kept_modules)
    return replace(model_map, tensors=tensors, notes=model_map.notes + notes)


@dataclass(frozen=True, slots=True)
class PlanRequirements:
    """The conditions that a plan must satisfy before the first byte is written.

    Attributes:
        min_coverage: share of the parameters, 0 to 1, that must become int8; None: see `check_coverage`.
        allow_missing: patterns of tensors that the source may lack.
    """

    min_coverage: float | None
    allow_missing: tuple[str, ...] = ()

    def check(self, plan: ConversionPlan) -> None:
        """Refuse a plan that does not satisfy them, see `check_needs` and `check_coverage`."""
        check_needs(plan.model_map, plan.source, self.allow_missing)
        check_coverage(plan, self.min_coverage)
