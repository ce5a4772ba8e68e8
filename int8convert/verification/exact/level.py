"""The exact level of `verify`: compares an int8 checkpoint with its source, tensor by tensor, without running a model.

1. The manifest names the source and the options of the conversion. From them the plan is rebuilt, as `quantize` makes
   it. It says what each tensor must have become (`layout`), and what the model lacks (`files`).
2. Every weight file is hashed and compared with the manifest, while other threads compare its tensors: codes and scales
   with the rounding of the source, everything else byte by byte (`tensors`, `rows`).
3. config.json is compared entry by entry with what the conversion writes (`config`), and auxiliary files with the
   source's. Any other file is a finding, unless no loader reads it (`files`).
4. Meanwhile a child process runs a few tokens through the model, without its weights (`trial_run`).

Either checkpoint may be on the Hub. Its tensors are then read by range, and its weights are not stored.

Costs one reading of both checkpoints, and a few megabytes for each thread. The arithmetic is written again on purpose,
in NumPy, so that the judge shares no defect with the converter. Shared are the reading of a source, and the plan of
which tensors become int8.

Does not know whether rounding to int8 harms this model; the fidelity level measures that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import CorruptFileError, SourceError
from int8convert.events import EventSink, ignore
from int8convert.formats.config import read_format
from int8convert.formats.format import Format
from int8convert.planning.plan import ConversionPlan
from int8convert.planning.plan_checkpoint import PlanOptions, plan_unchecked
from int8convert.planning.request_difference import describe_source
from int8convert.text import counted, quoted
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.comparison import Comparison
from int8convert.verification.exact.files import allowed_note
from int8convert.verification.exact.provenance import Provenance, find_provenance
from int8convert.verification.exact.trial_run import TrialRun
from int8convert.verification.opened import ExaminedCheckpoint, hub_reading, open_examined


@dataclass(frozen=True, slots=True)
class ExactReport:
    """The outcome of the exact level.

    Attributes:
        out, reference: the two checkpoints; the reference is None if `out` cannot be opened.
        format: the format of `out`.
        checks: all checks; docs/verify-json.md describes each.
        n_different_codes, n_different_scales: number of codes and scales that differ from the reference rounding. They
            are no defect if another tool computed the checkpoint, and codes are none if a calibration chose them.
        n_read_bytes: bytes of both checkpoints.
        notes: what the user should know about the measurement.
        commit, reference_commit: commits of checkpoints on the Hub; else None.
        files: sha256 of every file of `out` that was examined.
        compared: what `out` was compared with, for people.
    """

    out: str
    reference: str | None
    format: str
    checks: tuple[Check, ...]
    n_int8_weights: int = 0
    n_different_codes: int = 0
    n_different_scales: int = 0
    n_read_bytes: int = 0
    elapsed_s: float = 0.0
    notes: tuple[str, ...] = ()
    commit: str | None = None
    reference_commit: str | None = None
    files: Mapping[str, str] = field(default_factory=dict, repr=False)
    compared: str = ""

    @property
    def is_passed(self) -> bool:
        return all(check.is_passed for check in self.checks)


def verify_exact(
    out: str | os.PathLike[str] | ExaminedCheckpoint,
    *,
    revision: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    on_event: EventSink = ignore,
) -> ExactReport:
    """Compare an int8 checkpoint with its source.

    Args:
        out: the int8 checkpoint: a directory, a repository on the Hub, or one that is open.
        revision: branch, tag or commit of that repository.
        reference: the source; None for the one that the manifest names.
        lora: the adapter that was merged in the conversion.
        on_event: receives `HubReadStarted` and `TensorsCompared`.

    Raises:
        SourceError: `out` is no int8 checkpoint, or its source is missing.
        Int8ConvertError: the source cannot be read or planned, or the adapter is another one.
    """
    began = time.perf_counter()
    try:
        examined = out if isinstance(out, ExaminedCheckpoint) else open_examined(out, revision)
    except CorruptFileError as error:
        named = os.fspath(out)  # type: ignore[arg-type]
        finding = Finding(named, "a checkpoint whose files agree", error.message)
        return ExactReport(named, None, "", (make_check("files", 1, [finding]),))
    checkpoint = examined.source
    found = _format(checkpoint)
    provenance = find_provenance(checkpoint, reference, lora)
    n_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    with TrialRun(checkpoint, trust_remote_code) as trial:
        # Modules that were kept for their values are not planned as int8, and must then hold such values.
        planned = plan_unchecked(
            provenance.reference,
            PlanOptions(
                skip=(*provenance.skip, *provenance.kept_for_values),
                only=provenance.only,
                format=provenance.format,
                lora=provenance.lora,
                rotate=provenance.rotate,
                rotate_inputs=provenance.rotate_inputs,
                round_source=provenance.round_source,
                smooth=provenance.factors,
                trust_remote_code=trust_remote_code,
                revision=provenance.revision,
            ),
        )
        for reading in filter(None, map(hub_reading, (checkpoint, planned.source))):
            on_event(reading)
        comparison = Comparison(examined, planned, provenance)
        checks = comparison.run(n_workers, on_event)
        runs, not_tried = trial.result()
    return ExactReport(
        out=checkpoint.label,
        reference=provenance.reference,
        format=str(found),
        checks=(*checks, runs),
        n_int8_weights=len(comparison.layout.int8_modules),
        n_different_codes=comparison.totals.n_different_codes,
        n_different_scales=comparison.totals.n_different_scales,
        n_read_bytes=comparison.n_bytes,
        elapsed_s=time.perf_counter() - began,
        notes=(*_notes(provenance, planned), *not_tried),
        commit=checkpoint.commit,
        reference_commit=planned.source.commit,
        files=comparison.hashes,
        compared=_compared(planned.source, provenance),
    )


def _compared(source: CheckpointSource, provenance: Provenance) -> str:
    """Return what the checkpoint was compared with: how much of the source, and by which rule."""
    files = f"{counted(len(source.shards), 'weight file')}, config.json"
    others = f" and {counted(len(source.auxiliary_files), 'other file')}" if source.auxiliary_files else ""
    if not provenance.is_known:
        return f"{files}{others}; no manifest tells what the conversion wrote"
    exports = f", through {counted(len(provenance.exports), 'export')}" if provenance.exports else ""
    return f"{files}{others}, as its manifest says they were converted{exports}"


def _format(out: CheckpointSource) -> Format:
    if "quantization_config" not in out.config:
        what = "its config.json has no quantization_config" if out.config else "it has no config.json"
        raise SourceError(
            f"{quoted(out.label, 200)} is no int8 checkpoint: {what}",
            "give an output of int8convert quantize, or finish the conversion first",
        )
    return read_format(out.config)


def _notes(provenance: Provenance, planned: ConversionPlan) -> Iterator[str]:
    if not provenance.is_known:
        yield (
            "no manifest tells how the checkpoint was made: codes are judged by their distance to the weights, "
            "and no file by its sha256"
        )
    elif provenance.source_files and _identity(describe_source(planned.source)) != _identity(provenance.source_files):
        yield "the source is not the one of the conversion: its config.json, its files or their headers have changed"
    if provenance.lora is not None:
        yield "an adapter was merged, whose last bits depend on the machine: codes may differ halfway between two codes"
    if provenance.calibrated:
        yield (
            f"the codes of {counted(len(provenance.calibrated), 'weight')} were chosen by a calibration: each is less "
            "than one step from its weight, and whether it is the better of the two beside it is not checked"
        )
    if (allowed := allowed_note(planned.model_map, provenance)) is not None:
        yield allowed


def _identity(described: Any) -> Any:
    """Return what tells two sources apart, without the times of their files, which a copy changes."""
    files = described.get("files")
    files = files if isinstance(files, dict) else {}
    sizes = {name: (f.get("n_bytes"), f.get("header_sha256")) for name, f in files.items() if isinstance(f, dict)}
    return described.get("config_sha256"), sizes
