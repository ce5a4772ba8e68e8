"""`verify`: is an int8 checkpoint what it should be, and does it do what its source does? Levels, cheap to dear.

    exact       files, tensors, codes and scales against the source's; no model runs (`exact`)
    fidelity    both models on the same tokens, statistics of the paired differences, two gates (`fidelity`, `verdict`)
    tasks       both models on the same questions of zero-shot tasks, McNemar's test (`tasks`)

A level that does not pass is the last one: what a broken checkpoint computes is of no interest. `write_report` writes
the outcome into the checkpoint, as `int8convert/verify.json`. A checkpoint on the Hub stays as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert import __version__
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import AdapterError, CorruptFileError, Int8ConvertError
from int8convert.events import EventSink
from int8convert.formats.config import read_threshold
from int8convert.progress_bar import sink_or_bar
from int8convert.publish.verify_command import Gates
from int8convert.runtime.text.texts import Text, open_text
from int8convert.sources import open_source
from int8convert.verification.earlier_runs import with_earlier_failures
from int8convert.verification.exact.level import verify_exact
from int8convert.verification.exact.provenance import Provenance, find_provenance
from int8convert.verification.opened import ExaminedCheckpoint, hub_reading, open_examined
from int8convert.verification.options import Execution, Level, Tasks
from int8convert.verification.verdict import keeps_gates
from int8convert.verification.verify_report import TextUsed, VerifyReport

if TYPE_CHECKING:
    from int8convert.runtime.text.windows import TokenWindows
    from int8convert.verification.fidelity.level import FidelityReport

DEFAULT_LENGTH = 2048
"""Tokens of a window, or what the model takes if that is less."""

_DEFAULT_TEXT_LENGTH = 256
"""The same for the text that comes with int8convert: of its 4,500 tokens, longer windows leave too few sequences for an
interval."""


@dataclass(frozen=True, slots=True)
class _Models:
    """Two checkpoints whose weights are on this machine, and what both models read.

    Attributes:
        out: the int8 checkpoint.
        source: the source. Of one on the Hub, its label and commit are the Hub's.
        provenance: how `out` was made of it.
    """

    out: ExaminedCheckpoint
    source: CheckpointSource
    windows: TokenWindows
    text: TextUsed
    provenance: Provenance


def verify(
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    level: Level | str = Level.FIDELITY,
    text: Text = Text(),  # noqa: B008, frozen
    tasks: Tasks = Tasks(),  # noqa: B008, frozen
    gates: Gates = Gates(),  # noqa: B008, frozen
    execution: Execution = Execution(),  # noqa: B008, frozen
    lora: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    on_event: EventSink | None = None,
) -> VerifyReport:
    """Compare an int8 checkpoint with its source; `write_report` then stores the outcome.

    The level "exact" reads checkpoints on the Hub in place. The other levels fetch them into the Hub's cache first.

    Args:
        out: the int8 checkpoint: a directory, or a repository on the Hub.
        revision: branch, tag or commit of that repository.
        reference: the source; None for the one that the manifest names.
        level: "exact", "fidelity" or "tasks"; the levels before it come first.
        text: what both models read; windows have 2,048 tokens by default, or what the model takes, and 256 of the text
            that comes with int8convert.
        tasks: what both models answer at the level "tasks".
        gates: limits that a passing checkpoint keeps.
        execution: how the models run. At thresholds beside the checkpoint's own no gate applies.
        lora: the adapter that was merged in the conversion.
        trust_remote_code: run code in the checkpoints.
        on_event: receives the progress; None shows a tqdm bar.

    After the fidelity level the source runs on four more windows, to find the causes of the divergence; see `causes`.
    It does not if it was streamed.

    Raises:
        Int8ConvertError: the measurement failed. A broken checkpoint is no error: the report says so.
        ValueError: an argument is out of its range.
    """
    began = time.perf_counter()
    level = Level(level)
    if lora is not None and level is not Level.EXACT:
        raise AdapterError(
            "the source without the adapter is another model, so there is nothing to compare predictions with",
            "use --level exact, which compares the tensors with the adapter merged",
        )
    if level is Level.TASKS:
        from int8convert.verification.tasks import load_harness

        load_harness()
    try:
        checkpoint = open_examined(out, revision)
    except CorruptFileError:
        checkpoint = None  # the exact level reports which files disagree
    with sink_or_bar(on_event, "verify") as sink:
        models = None
        if level is not Level.EXACT and checkpoint is not None:
            # Before the comparison, so that errors in the text come at once.
            models = _prepare_models(checkpoint, reference, text, trust_remote_code, sink)
            checkpoint = models.out
        is_fetched = models is not None and models.source.commit is not None
        exact = verify_exact(
            checkpoint or out,
            revision=revision,
            reference=models.source.directory if models is not None and is_fetched else reference,
            lora=lora,
            trust_remote_code=trust_remote_code,
            on_event=sink,
        )
        if models is not None and is_fetched:
            exact = replace(exact, reference=models.source.label, reference_commit=models.source.commit)
        tool, named = f"int8convert {__version__}", os.fspath(out)
        report = VerifyReport(tool, named, str(level), gates, dict(exact.files), exact, reference=exact.reference)
        if report.is_passed and models is not None:
            fidelity, sweep = _measure(models, execution, trust_remote_code, sink)
            report = replace(report, text=models.text, fidelity=fidelity, sweep=sweep)
            report = _with_causes(report, models, trust_remote_code, sink)
    if report.is_passed and models is not None and level is Level.TASKS:
        from int8convert.verification.tasks import measure_tasks

        directories = models.source.directory, models.out.source.directory
        answers = measure_tasks(*directories, tasks, device=execution.device, trust_remote_code=trust_remote_code)
        report = replace(report, tasks=answers)
    report = replace(report, elapsed_s=time.perf_counter() - began)
    return report if exact.commit is not None else with_earlier_failures(report)


def _with_causes(report: VerifyReport, models: _Models, trust_remote_code: bool, on_event: EventSink) -> VerifyReport:
    """Add the causes of what was measured, if the source fits in memory, and a remedy if a gate was broken."""
    from int8convert.verification.causes import choose_remedy, find_causes, measure_damage, with_command

    measured = next((each for each in report.fidelity if not keeps_gates(report.gates, each)), report.fidelity[0])
    if measured.streamed:
        unknown = "the source was run layer by layer"
    else:
        try:
            damage = measure_damage(
                models.source,
                models.out.source,
                models.windows,
                measured,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        except Int8ConvertError as error:
            unknown = error.message
        else:
            remedy = None if keeps_gates(report.gates, measured) else choose_remedy(damage, measured, report.gates)
            if remedy is not None:
                remedy = with_command(remedy, models.provenance, report.out, trust_remote_code)
            return replace(report, causes=replace(find_causes(damage, measured), remedy=remedy))
    if report.is_passed:
        return report
    note = f"{unknown}, so the causes are not known; int8convert outliers SRC --text FILE --damage estimates them"
    return replace(report, exact=replace(report.exact, notes=(*report.exact.notes, note)))


def _prepare_models(
    checkpoint: ExaminedCheckpoint,
    reference: str | os.PathLike[str] | None,
    text: Text,
    trust_remote_code: bool,
    on_event: EventSink,
) -> _Models:
    """Read the text, find the source, and fetch the weights of both that are on the Hub."""
    windows, used = _read_windows(checkpoint.source, text, trust_remote_code)
    found = find_provenance(checkpoint.source, reference)
    source = open_source(found.reference, found.revision)
    local = replace(checkpoint, source=_fetch_weights(checkpoint.source, on_event))
    fetched = _fetch_weights(source, on_event)
    return _Models(local, fetched, windows, used, found)


def _read_windows(out: CheckpointSource, text: Text, trust_remote_code: bool) -> tuple[TokenWindows, TextUsed]:
    from int8convert.runtime.models import open_tokenizer
    from int8convert.runtime.text.windows import read_windows_by

    length = text.length
    if length is None:
        wanted = _DEFAULT_TEXT_LENGTH if text.is_default else DEFAULT_LENGTH
        length = min(wanted, _n_positions(out.config) or wanted)
    with open_text(text) as file, open_tokenizer(out.directory, trust_remote_code, out.label) as tokenizer:
        windows = read_windows_by(text.cut, file.path, tokenizer, text.n_sequences, length)
    n, length = windows.ids.shape
    used = TextUsed(
        name=windows.text,
        sha256=windows.text_sha256,
        description=file.description,
        is_default=text.is_default,
        n_text_tokens=windows.n_text_tokens,
        n_sequences=n,
        length=length,
        convention=windows.convention,
        dataset=text.dataset,
    )
    return windows, used


def _n_positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model takes at once by its config.json; None if that does not say."""
    for part in (config, config.get("text_config")):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = part.get(name) if isinstance(part, Mapping) else None
            if type(value) is int and value > 1:
                return value
    return None


def _fetch_weights(source: CheckpointSource, on_event: EventSink) -> CheckpointSource:
    """Return a checkpoint whose weight files are on this machine. Files on the Hub go into its cache."""
    if source.commit is None:
        return source
    from int8convert.hub.cached_copy import fetch_checkpoint, reading_cached

    reading = hub_reading(reading_cached(source), is_kept=True)
    if reading is not None:
        on_event(reading)
    fetch_checkpoint(source, on_event)
    return reading_cached(source)


def _measure(
    models: _Models, execution: Execution, trust_remote_code: bool, on_event: EventSink
) -> tuple[tuple[FidelityReport, ...], tuple[FidelityReport, ...]]:
    """Return what the gates look at, and the sweep over all thresholds, which they do not look at."""
    from int8convert.verification.fidelity.level import measure_fidelity

    out = models.out.source
    own = read_threshold(out.config, OUTLIER_THRESHOLD)
    swept = execution.thresholds
    measured = measure_fidelity(
        models.source.directory,
        out.directory,
        models.windows,
        replace(execution, thresholds=tuple(sorted({own, *swept})) if swept else ()),
        trust_remote_code=trust_remote_code,
        on_event=on_event,
    )
    if not swept:
        return measured, ()
    return tuple(report for report in measured if report.threshold in (own, None)), measured
