"""The events of a plan and its tensors, and what the manifest keeps of them, there and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.manifest import CalibratedRows, ShardRecord, TensorRecord
from int8convert.checkpoint.model_card import read_source_card
from int8convert.conversion.device import Device
from int8convert.conversion.readers import ReaderChoice
from int8convert.events import PlanMade, TensorKept, TensorQuantized
from int8convert.planning.export_plan import ShardedPlan
from int8convert.planning.needs import made_up
from int8convert.planning.plan import ConversionPlan, PlannedShard, PlannedTensor

_DECIMALS = 3
"""Decimals of decibels: the last digits of a float32 sum depend on the width of a processor's vectors."""


def plan_made(plan: ShardedPlan, device: Device, reader: ReaderChoice | None = None) -> PlanMade:
    """Return the event of a plan; `reader` is None where nothing is read from the Hub."""
    return PlanMade(
        source=plan.source.label,
        commit=plan.source.commit,
        model_class=plan.model_class,
        n_source_shards=len(plan.source.shards),
        n_read_bytes=plan.n_read_bytes,
        n_shards=len(plan.shards),
        n_written_bytes=plan.n_written_bytes,
        coverage=plan.coverage,
        notes=plan.notes,
        device=device.name,
        device_reason=device.reason or "",
        reader=str(reader.reader) if reader else None,
        reader_reason=reader.reason if reader else "",
    )


def plan_summary(plan: ConversionPlan) -> dict[str, Any]:
    """Return the entries of the manifest that are about the whole checkpoint."""
    factors = plan.folding and plan.folding.factors
    return {
        "tool": f"int8convert {__version__}",
        "source_card": read_source_card(plan.source.directory),
        "model_class": plan.model_map.model_class,
        "notes": list(plan.model_map.notes),
        "n_parameters": plan.n_parameters,
        "n_int8_parameters": plan.n_int8_parameters,
        "dropped": plan.dropped,
        "missing": made_up(plan.model_map),
        "skip_modules": list(plan.model_map.skip_modules),
        **({"smoothing_sha256": hashlib.sha256(factors.content()).hexdigest()} if factors else {}),
    }


def quantized_event(
    tensor: PlannedTensor,
    sqnr_db: float,
    absmax_range: tuple[float, float],
    n_zero_rows: int,
    is_replayed: bool = False,
    rounding: CalibratedRows | None = None,
) -> TensorQuantized:
    return TensorQuantized(
        tensor.output_name,
        tensor.source.name,
        tensor.shape[0],
        tensor.source.n_bytes,
        tensor.output_bytes,
        sqnr_db,
        *absmax_range,
        n_zero_rows,
        is_replayed,
        *((rounding.n_accepted, rounding.nearest_error, rounding.error) if rounding else ()),
    )


def kept_event(tensor: PlannedTensor, n_non_finite: int, n_zero_rows: int, is_replayed: bool = False) -> TensorKept:
    return TensorKept(
        tensor.output_name,
        tensor.source.name,
        tensor.shape[0] if tensor.shape else 0,
        tensor.source.n_bytes,
        tensor.output_bytes,
        tensor.output_dtype,
        tensor.reason,
        n_non_finite,
        n_zero_rows,
        is_replayed,
    )


def tensor_record(event: TensorQuantized | TensorKept) -> tuple[str, TensorRecord]:
    zeros = event.n_zero_rows
    if isinstance(event, TensorKept):
        return event.name, TensorRecord(
            event.source_name, event.dtype, event.reason, n_non_finite=event.n_non_finite, n_zero_rows=zeros
        )
    sqnr_db = round(event.sqnr_db, _DECIMALS) if math.isfinite(event.sqnr_db) else None
    rounding = None
    if event.n_accepted_rows is not None:
        rounding = CalibratedRows(event.n_accepted_rows, event.nearest_error, event.error)
    absmax_range = event.absmax_min, event.absmax_max
    return event.name, TensorRecord(
        event.source_name, "I8", None, sqnr_db, *absmax_range, n_zero_rows=zeros, rounding=rounding
    )


def replay_events(shard: PlannedShard, record: ShardRecord) -> Iterator[TensorQuantized | TensorKept]:
    """Yield the events of a shard that an earlier run finished."""
    for tensor in shard.tensors:
        found = record.tensors.get(tensor.output_name)
        if not tensor.is_quantized or found is None:
            counts = (found.n_non_finite, found.n_zero_rows) if found else (0, 0)
            yield kept_event(tensor, *counts, is_replayed=True)
        else:
            sqnr_db = math.inf if found.sqnr_db is None else found.sqnr_db
            absmax_range = found.absmax_min or 0.0, found.absmax_max or 0.0
            yield quantized_event(tensor, sqnr_db, absmax_range, found.n_zero_rows, True, found.rounding)
