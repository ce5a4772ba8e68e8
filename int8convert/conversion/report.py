"""The report of a conversion, collected from its events: coverage, what stayed and why, sizes, weight error, time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from int8convert.events import (
    Event,
    GroupsSmoothed,
    ModulesKept,
    PlanMade,
    ShardFinished,
    ShardRepeated,
    ShardSkipped,
    TensorKept,
    TensorQuantized,
)
from int8convert.planning.plan import ConversionPlan
from int8convert.text import counted, format_bytes

_MANY_ZEROS = 1 / 8
"""Share of a matrix's rows that must be zeros to be reported; padded vocabularies and pruned channels have fewer."""


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """Tensors that stayed as they are, for one reason."""

    reason: str
    n_tensors: int
    n_parameters: int


@dataclass(frozen=True, slots=True)
class LayerKindError:
    """Quantization error of the weights of one kind of layer, as signal to noise in decibels; higher is better.

    Attributes:
        mean_sqnr_db: mean of the tensors' values; infinite where nothing was lost.
        worst_sqnr_db: value of the worst tensor, `worst_tensor`.
    """

    layer_kind: str
    n_tensors: int
    mean_sqnr_db: float
    worst_sqnr_db: float
    worst_tensor: str


@dataclass(frozen=True, slots=True)
class RoundingReport:
    """The outcome of calibrated rounding.

    Attributes:
        n_tensors: weights whose codes the calibration chose, row by row.
        n_nearest: int8 weights that are rounded to nearest, as the calibration has no moments of their inputs.
        n_rows, n_accepted_rows, nearest_error, error: sums over those weights; see `events.TensorQuantized`.
    """

    n_tensors: int
    n_nearest: int
    n_rows: int
    n_accepted_rows: int
    nearest_error: float
    error: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The outcome of `quantize`.

    Attributes:
        source, out: as named by the caller; `out` is None if it was published and removed.
        model_class: the transformers class that decided; None where name rules did.
        coverage, byte_coverage: share of parameters, and of source bytes, that became int8; 0 to 1.
        kept: tensors that did not become int8, by reason.
        kept_by_budget: the modules that a budget keeps in 16 bits; None without a budget.
        dropped: source tensors written under another name only.
        non_finite: name of a kept tensor that holds NaN or infinity -> number of such values.
        zero_rows: name of a matrix of which an eighth or more of the rows are zeros -> number of such rows. Its file
            may be half written.
        elapsed_s: seconds of wall time, start to end, without the interpreter's start.
        commit: commit of the source on the Hub; None for a directory.
        reader, reader_reason: how shards were read from the Hub; the reason is None if the user chose. None if none
            were.
        n_done_shards: shards that an earlier run finished.
        n_read_now_bytes: bytes that this run read.
        rounding: None if all weights are rounded to nearest.
        smoothed: None if nothing is smoothed.
    """

    source: str
    out: str | None
    format: str
    model_class: str | None
    n_shards: int
    n_read_bytes: int
    n_written_bytes: int
    n_parameters: int
    n_int8_parameters: int
    coverage: float
    byte_coverage: float
    kept: tuple[KeptTensors, ...]
    kept_by_budget: ModulesKept | None
    dropped: tuple[str, ...]
    non_finite: dict[str, int]
    zero_rows: dict[str, int]
    errors: tuple[LayerKindError, ...]
    elapsed_s: float
    notes: tuple[str, ...]
    device: str
    commit: str | None
    reader: str | None
    reader_reason: str | None
    n_done_shards: int
    n_read_now_bytes: int
    rounding: RoundingReport | None
    smoothed: GroupsSmoothed | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object. Infinity, which JSON lacks, becomes null."""
        fields: dict[str, Any] = {"schema": 1, **asdict(self)}
        for error in fields["errors"]:
            for key in ("mean_sqnr_db", "worst_sqnr_db"):
                error[key] = error[key] if math.isfinite(error[key]) else None
        return fields


def notes_of(event: Event) -> list[str]:
    """Return what the user should know of an event, beside the numbers."""
    match event:
        case PlanMade(device=device, reader=reader):
            notes = []
            if event.device_reason:
                notes.append(f"quantizing on {device}: {event.device_reason}; --device chooses otherwise")
            if reader is not None:
                reason = f": {event.reader_reason}; --reader chooses otherwise" if event.reader_reason else ""
                notes.append(f"reading {event.source} at {(event.commit or '')[:12]} by {reader}{reason}")
            return [*notes, *event.notes]
        case ModulesKept():
            return [_kept_note(event)]
        case ShardRepeated(i, n, file_name, reason):
            return [f"shard {i + 1} of {n}, {file_name}, is made again: {reason}"]
        case _:
            return []


def _kept_note(event: ModulesKept) -> str:
    modules = counted(len(event.names), "module")
    if event.kl_before is None or event.kl_after is None:
        return f"{modules} stay 16-bit, as an earlier run of this conversion chose"
    if not event.names:
        return f"no module fits into the budget; the expected KL divergence is {event.kl_before:.2g} nats a token"
    note = (
        f"{modules} stay 16-bit and take {format_bytes(event.n_bytes or 0)} more; the expected KL divergence falls "
        f"from {event.kl_before:.2g} to {event.kl_after:.2g} nats a token"
    )
    if event.n_unmeasured:
        note += f"; {event.n_unmeasured:,} other weights become int8 and were not measured"
    return note


@dataclass(slots=True)
class ReportBuilder:
    """Receives a conversion's events and makes its report."""

    quantized: dict[str, TensorQuantized] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    zero_rows: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plan_made: PlanMade | None = None
    modules_kept: ModulesKept | None = None
    groups_smoothed: GroupsSmoothed | None = None
    finished: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)

    def __call__(self, event: Event) -> None:
        self.notes += notes_of(event)
        if isinstance(event, PlanMade):
            self.plan_made = event
        elif isinstance(event, ModulesKept):
            self.modules_kept = event
        elif isinstance(event, GroupsSmoothed):
            self.groups_smoothed = event
        elif isinstance(event, ShardFinished):
            self.finished.add(event.file_name)
        elif isinstance(event, ShardSkipped):
            self.skipped.add(event.file_name)
        elif isinstance(event, TensorQuantized):
            self.quantized[event.name] = event  # of a shard that is repeated, the last
            self._note_zeros(event)
        elif isinstance(event, TensorKept):
            self.non_finite.pop(event.name, None)
            if event.n_non_finite:
                self.non_finite[event.name] = event.n_non_finite
            self._note_zeros(event)

    def _note_zeros(self, event: TensorQuantized | TensorKept) -> None:
        self.zero_rows.pop(event.name, None)
        if event.n_zero_rows and event.n_zero_rows >= _MANY_ZEROS * event.n_rows:
            self.zero_rows[event.name] = event.n_zero_rows

    def restart(self) -> None:
        """Forget all events: the conversion begins again."""
        self.quantized.clear()
        self.non_finite.clear()
        self.zero_rows.clear()
        self.notes.clear()

    def build(self, plan: ConversionPlan, out: str | None, device: str, elapsed_s: float) -> ConversionReport:
        done = [shard for shard in plan.shards if shard.file_name in self.skipped - self.finished]
        return ConversionReport(
            source=plan.source.label,
            out=out,
            format=plan.model_map.output_format,
            model_class=plan.model_map.model_class,
            n_shards=len(plan.shards),
            n_read_bytes=plan.n_read_bytes,
            n_written_bytes=plan.n_written_bytes,
            n_parameters=plan.n_parameters,
            n_int8_parameters=plan.n_int8_parameters,
            coverage=plan.coverage,
            byte_coverage=plan.byte_coverage,
            kept=tuple(KeptTensors(reason, *counts) for reason, counts in plan.kept_by_reason().items()),
            kept_by_budget=self.modules_kept,
            dropped=tuple(plan.dropped),
            non_finite=dict(sorted(self.non_finite.items())),
            zero_rows=dict(sorted(self.zero_rows.items())),
            errors=self._errors(),
            elapsed_s=elapsed_s,
            notes=tuple(self.notes),
            device=device,
            commit=plan.source.commit,
            reader=self.plan_made.reader if self.plan_made else None,
            reader_reason=self.plan_made.reader_reason or None if self.plan_made else None,
            n_done_shards=len(done),
            n_read_now_bytes=plan.n_read_bytes - sum(shard.n_read_bytes for shard in done),
            rounding=self._rounding(),
            smoothed=self.groups_smoothed,
        )

    def _rounding(self) -> RoundingReport | None:
        rounded = [each for _, each in sorted(self.quantized.items()) if each.n_accepted_rows is not None]
        if not rounded:
            return None
        return RoundingReport(
            len(rounded),
            len(self.quantized) - len(rounded),
            sum(each.n_rows for each in rounded),
            sum(each.n_accepted_rows or 0 for each in rounded),
            sum(each.nearest_error for each in rounded),
            sum(each.error for each in rounded),
        )

    def _errors(self) -> tuple[LayerKindError, ...]:
        by_kind: dict[str, list[TensorQuantized]] = {}
        for event in (self.quantized[name] for name in sorted(self.quantized)):
            by_kind.setdefault(event.layer_kind, []).append(event)
        errors = []
        for kind, events in by_kind.items():
            worst = min(events, key=lambda event: event.sqnr_db)
            mean = sum(event.sqnr_db for event in events) / len(events)
            errors.append(LayerKindError(kind, len(events), mean, worst.sqnr_db, worst.name))
        return tuple(sorted(errors, key=lambda error: error.worst_sqnr_db))
