"""What a conversion did, collected from its events: coverage, what stayed and why, sizes, weight error, time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from int8convert.conversion.events import Event, TensorKept, TensorQuantized
from int8convert.conversion.plan import ConversionPlan


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """Tensors that stayed as they are, for one reason."""

    reason: str
    n_tensors: int
    n_parameters: int


@dataclass(frozen=True, slots=True)
class LayerKindError:
    """Quantization error of the weights of one kind of layer, as signal to noise in decibels; higher is better.

    mean_sqnr_db: mean of the tensors' values; infinite where nothing was lost.
    worst_sqnr_db: of the worst tensor, `worst_tensor`.
    """

    layer_kind: str
    n_tensors: int
    mean_sqnr_db: float
    worst_sqnr_db: float
    worst_tensor: str


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The outcome of `quantize`.

    Attributes:
        source, out: as named by the caller.
        model_class: the transformers class that decided; None where name rules did.
        coverage, byte_coverage: share of parameters, and of source bytes, that became int8; 0 to 1.
        kept: what did not, by reason.
        dropped: source tensors written under another name only.
        non_finite: kept tensors that hold NaN or infinity -> how many.
        errors: weight error by kind of layer.
        elapsed_s: seconds of wall time, start to end, without the interpreter's start.
    """

    source: str
    out: str
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
    dropped: tuple[str, ...]
    non_finite: dict[str, int]
    errors: tuple[LayerKindError, ...]
    elapsed_s: float
    notes: tuple[str, ...]
    device: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; infinity, which JSON has not, becomes null."""
        fields: dict[str, Any] = {"schema": 1, **asdict(self)}
        for error in fields["errors"]:
            for key in ("mean_sqnr_db", "worst_sqnr_db"):
                error[key] = error[key] if math.isfinite(error[key]) else None
        return fields


@dataclass(slots=True)
class ReportBuilder:
    """Listens to a conversion's events and makes its report."""

    quantized: dict[str, TensorQuantized] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, TensorQuantized):
            self.quantized[event.tensor.output_name] = event  # of a shard that is repeated, the last
        elif isinstance(event, TensorKept):
            self.non_finite.pop(event.tensor.output_name, None)
            if event.n_non_finite:
                self.non_finite[event.tensor.output_name] = event.n_non_finite

    def restart(self) -> None:
        """Forget what was seen: the conversion begins again."""
        self.quantized.clear()
        self.non_finite.clear()

    def build(self, plan: ConversionPlan, out: str, device: str, elapsed_s: float) -> ConversionReport:
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
            dropped=tuple(plan.dropped),
            non_finite=dict(sorted(self.non_finite.items())),
            errors=self._errors(),
            elapsed_s=elapsed_s,
            notes=plan.model_map.notes,
            device=device,
        )

    def _errors(self) -> tuple[LayerKindError, ...]:
        by_kind: dict[str, list[TensorQuantized]] = {}
        for event in (self.quantized[name] for name in sorted(self.quantized)):
            by_kind.setdefault(event.tensor.layer_kind, []).append(event)
        errors = []
        for kind, events in by_kind.items():
            worst = min(events, key=lambda event: event.sqnr_db)
            mean = sum(event.sqnr_db for event in events) / len(events)
            errors.append(LayerKindError(kind, len(events), mean, worst.sqnr_db, worst.tensor.output_name))
        return tuple(sorted(errors, key=lambda error: error.worst_sqnr_db))
