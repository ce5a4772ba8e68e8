"""What a later report keeps of earlier runs on the same checkpoint: failures that stand, and higher levels that passed.

verify.json holds what the last run found. A run at a lower level, on fewer tokens or on another text says nothing of
what an earlier one measured, so a failure is copied into each later report:

- it is cleared by a run on the same text, in windows cut in the same way and as long, and at least as many tokens (of
  tasks: questions) that keeps the broken gates;
- it is overruled by such a run that keeps gates of its own, if those are looser; then the checkpoint passes, and
  verify.json and the model card name both;
- it is replaced by the failure of such a run whose gates are as strict;
- it does not apply while weights, config.json or stored columns are not those that were measured;
- else it stands, and the checkpoint does not pass, whatever the later run found.

A run on too few tokens to say clears no failure, and adds none.

Results that passed at a higher level are kept if the same version measured them on the same files and this run passes.

Removing verify.json removes its failures; the checkpoint is then not verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from int8convert.checkpoint.names import CONFIG_NAME, MANIFEST_NAME
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
from int8convert.publish.verify_command import Gates, name_of_convention
from int8convert.publish.verify_json import (
    EarlierFailure,
    Status,
    Verdict,
    deciding_files,
    failures_on_record,
    read_verify_json,
    write_verify_json,
)
from int8convert.verification.options import Level
from int8convert.verification.verdict import fidelity_verdict, task_failures
from int8convert.verification.verify_report import VerifyReport

_MOST = 20
"""Failures of other files that a report keeps, the latest. Beyond as many failures of these files, those are dropped
that are cleared with another."""

_PARTS = {Level.FIDELITY: ("text", "fidelity", "sweep", "causes"), Level.TASKS: ("tasks",)}
_GATES = {Level.FIDELITY: ("max_dnll", "max_kl"), Level.TASKS: ("min_task_p",)}
"""Entries of a report and gates, by the level that adds them."""


def write_report(report: VerifyReport) -> Path | None:
    """Write a report into the checkpoint, with the parts of an earlier one that it keeps.

    Returns:
        the path; None for a checkpoint on the Hub, which stays as it is.
    """
    if report.exact.commit is not None:
        return None
    return write_verify_json(Path(report.out), report.to_published_json() | kept_parts(report))


def with_earlier_failures(report: VerifyReport) -> VerifyReport:
    """Add the failures of earlier runs that a report does not clear."""
    try:
        earlier = read_verify_json(Path(report.out))
    except (CorruptFileError, SourceError) as error:
        lost = f"what earlier runs found is not known: {error.message}"
        return replace(report, exact=replace(report.exact, notes=(*report.exact.notes, lost)))
    kept = kept_parts(report).get("kept", ())
    judged = [judged for each in failures_on_record(earlier) if (judged := _judge(each, report, kept)) is not None]
    others = [failure for failure in judged if failure.status is Status.OTHER_FILES]
    ours = [failure for failure in judged if failure.status is not Status.OTHER_FILES]
    if len(ours) > _MOST:
        ours = _without_weaker(ours)
    return replace(report, earlier_failures=(*others[-_MOST:], *ours))


def kept_parts(report: VerifyReport) -> dict[str, Any]:
    """Return the entries of the present verify.json that go beside those of a report: levels above its own, with the
    gates they had to keep.

    Empty unless both passed, by the same version, on the same files.
    """
    parts: dict[str, Any] = {}
    gates = asdict(report.gates)
    try:
        earlier = read_verify_json(Path(report.out)) if report.is_passed else {}
        if not earlier.get("is_passed") or earlier["tool"] != report.tool:
            return {}
        if not _is_same_model(earlier["files"], report.files):
            return {}
        for level in list(Level)[list(Level).index(Level(report.level)) + 1 :]:
            parts |= {name: earlier[name] for name in _PARTS[level] if earlier.get(name)}
            gates |= {name: earlier["gates"][name] for name in _GATES[level]}
        return {**parts, "level": earlier["level"], "gates": gates, "kept": sorted(parts)} if parts else {}
    except (CorruptFileError, SourceError, KeyError, TypeError, AttributeError):  # not written by us
        return {}


def _judge(failure: EarlierFailure, report: VerifyReport, kept: Sequence[str]) -> EarlierFailure | None:
    """Return a failure with its status for a report; None if the report clears it."""
    if not report.files:  # the checkpoint could not even be opened
        return failure
    if not _is_same_model(failure.files, report.files):
        return replace(failure, status=Status.OTHER_FILES)
    judge = _tasks_judge(failure, report) if failure.level == "tasks" else _fidelity_judge(failure, report)
    if judge is None:  # the run did not measure it again, or on less
        is_overruled = failure.status is Status.OVERRULED and failure.level in kept
        return failure if is_overruled else replace(failure, status=Status.STANDS)
    if judge(failure.gates) == {Verdict.PASSED}:
        return None
    found = judge(report.gates)
    if found == {Verdict.PASSED}:
        return replace(failure, status=Status.OVERRULED)
    # What fails again is on record as a failure of this run. What is undecided is not.
    is_replaced = Verdict.UNDECIDED not in found and report.gates.is_as_strict_as(failure.gates)
    return None if is_replaced else replace(failure, status=Status.STANDS)


_Judge = Callable[[Gates], set[Verdict]]
"""Function that returns the verdicts, under the given gates, on what a failure measured."""


def _fidelity_judge(failure: EarlierFailure, report: VerifyReport) -> _Judge | None:
    runs = {run.mode: run for run in report.fidelity}
    if report.text is None or not _is_as_hard(asdict(report.text), failure.text):
        return None
    if not all(mode in runs and runs[mode].n_tokens >= n for mode, n in failure.measured.items()):
        return None
    return lambda gates: {fidelity_verdict(gates, runs[mode]) for mode in failure.measured}


def _tasks_judge(failure: EarlierFailure, report: VerifyReport) -> _Judge | None:
    tasks = {f"{task.task} {task.metric}": task for task in report.tasks}
    if not all(name in tasks and tasks[name].n_samples >= n for name, n in failure.measured.items()):
        return None
    return lambda gates: {
        Verdict.FAILED if list(task_failures(gates, tasks[name])) else Verdict.PASSED for name in failure.measured
    }


def _without_weaker(failures: Sequence[EarlierFailure]) -> list[EarlierFailure]:
    """Leave out what is cleared whenever another one is; of equal failures the last stays."""
    kept: list[EarlierFailure] = []
    for failure in reversed(failures):
        if not any(_is_implied(failure, other) for other in kept):
            kept = [other for other in kept if not _is_implied(other, failure)] + [failure]
    return kept[::-1]


def _is_implied(failure: EarlierFailure, other: EarlierFailure) -> bool:
    """Return whether a run that clears the other failure clears this one, too."""
    is_on_less = all(other.measured.get(name, 0) >= n for name, n in failure.measured.items())
    is_alike = failure.level == other.level and failure.status is other.status and failure.files == other.files
    is_covered = failure.level == "tasks" or _is_as_hard(other.text, failure.text)
    return is_alike and is_on_less and is_covered and other.gates.is_as_strict_as(failure.gates)


def _is_as_hard(text: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a text is the other one, cut in the same way into windows that are at least as long.

    Entries that an early version did not write are not compared.
    """
    is_same_cut = "convention" not in other or name_of_convention(text) == name_of_convention(other)
    length, needed = text.get("length"), other.get("length", 0)
    is_as_long = is_size(length) and (not is_size(needed) or length >= needed)
    return "sha256" in other and text.get("sha256") == other["sha256"] and is_same_cut and is_as_long


def _is_same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two lists of files and their sha256 have the same weights, config and stored columns."""
    names = deciding_files(one) | deciding_files(other)
    if not all(any(name.endswith(".safetensors") and "/" not in name for name in files) for files in (one, other)):
        # Written by an early version, which named the manifest in the place of the weights.
        names = {name for name in names if "/" in name or name == CONFIG_NAME} | {MANIFEST_NAME}
    return bool(names) and all(one.get(name) == other.get(name) for name in names)
