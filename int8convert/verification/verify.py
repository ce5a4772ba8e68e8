"""`verify`: is an int8 checkpoint what it should be, and does it do what its source does? Levels, cheap to dear.

    exact       files, tensors, codes, scales against the source's; no model is run (`exact`)
    fidelity    both models on the same tokens, statistics of the paired differences, two gates (`fidelity`)
    tasks       both models on the same questions of zero-shot tasks, McNemar's test (`zero_shot`)

A level that fails is the last: what a broken checkpoint computes is of no interest. What was found is written into the
checkpoint, `int8convert/verify.json`, so that whoever gets it sees how it was measured; but for one that is on the Hub.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert import __version__
from int8convert.checkpoint.atomic import make_folder, write_json
from int8convert.checkpoint.names import VERIFY_FILE
from int8convert.checkpoint.source import CheckpointSource
from int8convert.conversion.quantize import DEFAULT_THRESHOLD
from int8convert.errors import AdapterError, CorruptFileError, SourceError
from int8convert.events import EventSink
from int8convert.formats.int8_config import read_threshold
from int8convert.progress_bar import sink_or_bar
from int8convert.runtime.text.texts import Text, open_text
from int8convert.sources import open_source
from int8convert.verification.earlier_failures import is_same_model, judge_earlier, read_earlier
from int8convert.verification.exact.level import verify_exact
from int8convert.verification.exact.provenance import find_provenance
from int8convert.verification.gates import Gates
from int8convert.verification.opened import hub_reading, open_examined
from int8convert.verification.verify_report import TextUsed, VerifyReport

if TYPE_CHECKING:
    from int8convert.runtime.text.windows import TokenWindows
    from int8convert.verification.fidelity.level import FidelityReport

DEFAULT_SEQUENCES = 16
DEFAULT_LENGTH = 2048
"""Tokens of a window, or what the model takes, if that is less."""

_DEFAULT_TEXT_LENGTH = 256
"""The text that comes along has some 4,500 tokens, and an interval needs more than two or three sequences."""


class Level(StrEnum):
    """How far to go."""

    EXACT = "exact"
    FIDELITY = "fidelity"
    TASKS = "tasks"


_PARTS = {Level.FIDELITY: ("text", "fidelity", "sweep"), Level.TASKS: ("tasks",)}
_GATES = {Level.FIDELITY: ("max_dnll", "max_kl"), Level.TASKS: ("min_task_p",)}
"""What each level adds to a report, and what it must not exceed."""


def verify(
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    level: str = Level.FIDELITY,
    modes: Sequence[str] = (),
    thresholds: Sequence[float] = (),
    tasks: Sequence[str] = (),
    tasks_path: str | os.PathLike[str] | None = None,
    task_limit: int | None = None,
    gates: Gates = Gates(),  # noqa: B008, nothing of it changes
    n_sequences: int = DEFAULT_SEQUENCES,
    length: int | None = None,
    convention: str | None = None,
    stream: bool | None = None,
    device: str = "auto",
    lora: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    on_event: EventSink | None = None,
) -> VerifyReport:
    """Compare an int8 checkpoint with what it was made of; `write_report` then puts the outcome into it.

    Whichever of the two is on the Hub is read from there at the level "exact", and fetched into the Hub's cache for the
    others.

    Args:
        out: the int8 checkpoint: a directory, or a repository on the Hub.
        revision: of that repository: a branch, a tag or a commit.
        reference: the checkpoint it was converted from; None takes the one its manifest names.
        text: a file in UTF-8 to run both models on; None takes a small one that comes along.
        dataset: "wikitext2" or "c4" in its place, from the Hugging Face Hub or its cache.
        level: "exact", "fidelity" or "tasks"; those before it come first.
        modes: the arithmetic to run, see `verification.fidelity.arithmetic`; none takes what `load` would run.
        thresholds: run that at these outlier thresholds, too; the gates look at the checkpoint's own alone.
        tasks, tasks_path, task_limit: see `measure_tasks`.
        gates: what passes.
        n_sequences, length: at most so many windows of so many tokens, from all over the text; None takes 2,048 or
            what the model takes, 256 on the text that comes along.
        convention: how the text is cut, see `windows.Convention`; None is "contiguous" for a dataset, as published
            figures are, and else "spread".
        stream: run both models layer by layer, for those larger than memory; None does so where needed.
        device: where they run: "auto", "cpu" or "cuda[:n]".
        lora: the adapter that was merged in the conversion.
        trust_remote_code: as `quantize` has it.
        on_event: receives the progress; None shows a tqdm bar.

    Raises:
        Int8ConvertError: it could not be measured. That the checkpoint is broken or too far from its source is no
            error: the report says so.
        ValueError: an argument is out of its range.
    """
    began = time.perf_counter()
    level = Level(level)
    if n_sequences < 1 or (length is not None and length < 2) or any(map(math.isnan, astuple(gates))):
        raise ValueError("n_sequences must be at least 1, length at least 2, and the gates numbers")
    if lora is not None and level is not Level.EXACT:
        raise AdapterError(
            "the source without the adapter is another model, so there is nothing to compare predictions with",
            "--level exact compares the tensors, adapter included",
        )
    if level is Level.TASKS:
        from int8convert.verification.tasks import load_harness

        load_harness()
    try:
        checkpoint = open_examined(out, revision)
    except CorruptFileError:
        checkpoint = None  # the exact level says in what its files do not agree
    here = Path(out) if checkpoint is None else checkpoint.source.directory
    with ExitStack() as stack:
        sink = stack.enter_context(sink_or_bar(on_event, "verify"))
        windows, used, source = None, None, None
        # Whatever is wrong with the text is said before anything is compared; of a broken checkpoint, what is broken.
        if level is not Level.EXACT and checkpoint is not None:
            found = stack.enter_context(open_text(text, dataset))
            windows, used = _windows(checkpoint.source, found, n_sequences, length, convention, trust_remote_code)
            source = _open_reference(checkpoint.source, reference)
            checkpoint = replace(checkpoint, source=_at_hand(checkpoint.source, sink))
            _at_hand(source, sink)
        exact = verify_exact(
            checkpoint or out,
            revision=revision,
            reference=reference if source is None or source.commit is None else source.directory,
            lora=lora,
            trust_remote_code=trust_remote_code,
            on_event=sink,
        )
        place = str(exact.reference)  # where the models are read from; what they are called may be something else
        if source is not None and source.commit is not None:
            exact = replace(exact, reference=source.label, reference_commit=source.commit)
        report = VerifyReport(
            f"int8convert {__version__}", os.fspath(out), str(level), gates, {}, exact, reference=exact.reference
        )
        if report.is_passed and windows is not None:
            fidelity, sweep = _measure(
                place,
                here,
                windows,
                thresholds,
                modes=modes,
                stream=stream,
                device=device,
                trust_remote_code=trust_remote_code,
                on_event=sink,
            )
            report = replace(report, text=used, fidelity=fidelity, sweep=sweep)
    if report.is_passed and level is Level.TASKS:
        from int8convert.verification.tasks import measure_tasks

        found_tasks = measure_tasks(
            place,
            here,
            tasks,
            tasks_path=tasks_path,
            limit=task_limit,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        report = replace(report, tasks=found_tasks)
    report = replace(report, files=dict(exact.files), elapsed_s=time.perf_counter() - began)
    return report if exact.commit is not None else with_earlier_failures(report)


def with_earlier_failures(report: VerifyReport) -> VerifyReport:
    """Add to a report what earlier runs on the same checkpoint measured, failed, and this one does not clear."""
    try:
        earlier = read_earlier(Path(report.out))
    except (CorruptFileError, SourceError) as error:
        lost = f"what earlier runs found is not known: {error.message}"
        return replace(report, exact=replace(report.exact, notes=(*report.exact.notes, lost)))
    return replace(report, earlier_failures=judge_earlier(report, earlier, kept_parts(report).get("kept", ())))


def _measure(
    reference: str, out: Path, windows: TokenWindows, thresholds: Sequence[float], **options: Any
) -> tuple[tuple[FidelityReport, ...], tuple[FidelityReport, ...]]:
    """What the gates look at, and what they do not: all of it again, with other thresholds between."""
    from int8convert.verification.fidelity.level import measure_fidelity

    own = read_threshold(open_source(out).config, DEFAULT_THRESHOLD)
    chosen = sorted({own, *thresholds}) if thresholds else ()
    measured = measure_fidelity(reference, out, windows, thresholds=chosen, **options)
    if not thresholds:
        return measured, ()
    return tuple(report for report in measured if report.threshold in (own, None)), measured


def write_report(report: VerifyReport) -> Path | None:
    """Put a report beside what it is about, whole or not at all; None where that is on the Hub, which stays as it is.

    What an earlier run passed at higher levels on the same files is kept, see `kept_parts`; what it failed is part of
    the report, see `earlier_failures`.

    Raises:
        OSError: the directory cannot be written to.
    """
    if report.exact.commit is not None:
        return None
    path = Path(report.out) / VERIFY_FILE
    make_folder(path.parent)
    write_json(path, report.to_published_json() | kept_parts(report))
    return path


def kept_parts(report: VerifyReport) -> dict[str, Any]:
    """What the verify.json that is there holds of levels above this report's, with the gates it had to pass: entries to
    go beside those of this report.

    Empty unless both passed, by the same version, on the same files. What failed is kept in another way, see
    `earlier_failures`.
    """
    parts: dict[str, Any] = {}
    gates = asdict(report.gates)
    try:
        earlier = read_earlier(Path(report.out)) if report.is_passed else {}
        if not earlier.get("is_passed") or earlier["tool"] != report.tool:
            return {}
        if not is_same_model(earlier["files"], report.files):
            return {}
        for level in list(Level)[list(Level).index(Level(report.level)) + 1 :]:
            parts |= {name: earlier[name] for name in _PARTS[level] if earlier[name]}
            gates |= {name: earlier["gates"][name] for name in _GATES[level]}
        return {**parts, "level": earlier["level"], "gates": gates, "kept": sorted(parts)} if parts else {}
    except (CorruptFileError, SourceError, KeyError, TypeError, AttributeError):  # not written by us
        return {}


def _windows(
    out: CheckpointSource,
    text: Text,
    n_sequences: int,
    length: int | None,
    convention: str | None,
    trust_remote_code: bool,
) -> tuple[TokenWindows, TextUsed]:
    from int8convert.runtime.models import open_tokenizer
    from int8convert.runtime.text.windows import Convention, read_windows_by

    cut = Convention(convention) if convention else Convention.CONTIGUOUS if text.is_dataset else Convention.SPREAD

    if length is None:
        wanted = _DEFAULT_TEXT_LENGTH if text.is_default else DEFAULT_LENGTH
        length = min(wanted, _n_positions(out.config) or wanted)
    with open_tokenizer(out.directory, trust_remote_code, out.label) as tokenizer:
        windows = read_windows_by(cut, text.path, tokenizer, n_sequences, length)
    n, length = windows.ids.shape
    used = TextUsed(
        windows.text,
        windows.text_sha256,
        text.description,
        text.is_default,
        windows.n_text_tokens,
        n,
        length,
        windows.convention,
        text.path.name if text.is_dataset else None,
    )
    return windows, used


def _open_reference(out: CheckpointSource, reference: str | os.PathLike[str] | None) -> CheckpointSource:
    """What the models are compared with: the one that is named, or the manifest's."""
    found = find_provenance(out, reference)
    return open_source(found.reference, found.revision)


def _at_hand(source: CheckpointSource, on_event: EventSink) -> CheckpointSource:
    """A checkpoint whose weight files are here: one that is on the Hub is brought into its cache."""
    if source.commit is None:
        return source
    from int8convert.hub.cached_copy import fetch_checkpoint, reading_cached

    reading = hub_reading(reading_cached(source), is_kept=True)
    if reading is not None:
        on_event(reading)
    fetch_checkpoint(source, on_event)
    return reading_cached(source)


def _n_positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens the model takes at once, by its config.json; None if that does not say."""
    for part in (config, config.get("text_config")):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = part.get(name) if isinstance(part, Mapping) else None
            if type(value) is int and value > 1:
                return value
    return None
