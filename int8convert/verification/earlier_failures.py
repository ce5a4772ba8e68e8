"""Failed measurements on record: a later run does not replace them unless it measures the same again, and passes.

verify.json holds what the last run found. A run at a lower level, on fewer tokens or on another text says nothing of
what an earlier one measured, so a failure is copied into each later report:

- it is cleared by a run on the same text, in windows cut in the same way and as long, and at least as many tokens (of
  tasks: questions) that keeps the broken gates;
- it is overruled by such a run that keeps gates of its own, if those are looser; then the checkpoint passes, and
  verify.json and the model card name both;
- it does not apply while weights, config.json or stored columns are not those that were measured;
- else it stands, and the checkpoint does not pass, whatever the later run found.

Removing verify.json removes its failures; the checkpoint is then not verified.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import CONFIG_NAME, MANIFEST_NAME, VERIFY_FILE, find_file, quoted
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.publish.verify_command import gate_options, task_options, text_options
from int8convert.verification.gates import Gates

if TYPE_CHECKING:
    from int8convert.verification.verify_report import VerifyReport

_MOST = 20
"""Failures of other files that are kept in one report, the latest. Beyond as many of these files, those go that are
cleared with another."""

_MAX_LINES = 10
_TEXT_ENTRIES = ("name", "sha256", "dataset", "is_default", "n_sequences", "length", "convention")


class Status(StrEnum):
    """What an earlier failure means for a later report."""

    STANDS = "stands"
    OVERRULED = "overruled"
    OTHER_FILES = "other files"


@dataclass(frozen=True, slots=True)
class EarlierFailure:
    """A measurement that broke its gates.

    Attributes:
        level: "fidelity" or "tasks".
        tool: the version that measured.
        failures: one line for each broken gate.
        gates: the gates the run had to keep.
        text: of the fidelity level, what the models read: entries of `TextUsed`.
        measured: what broke a gate -> how much it was measured on: a mode and its tokens, a task's metric and its
            questions.
        files: file that decides what the model computes -> sha256.
    """

    level: str
    tool: str
    failures: tuple[str, ...]
    gates: Gates
    text: Mapping[str, Any]
    measured: Mapping[str, int]
    files: Mapping[str, str] = field(repr=False)
    status: Status = Status.STANDS

    def lines(self) -> Iterator[str]:
        """Yield one readable line per broken gate, with the amount measured."""
        amounts = " and ".join(f"{n:,}" for n in sorted(set(self.measured.values())))
        what = "questions" if self.level == "tasks" else f"tokens of {self.text.get('name')}"
        for line in self.failures:
            yield f"an earlier run, on {amounts} {what}: {line}"

    def command(self, out: str) -> str:
        """Return the command that clears the failure once it passes."""
        has_tasks = self.level == "tasks"
        if has_tasks:
            words = task_options(name.partition(" ")[0] for name in self.measured)
        else:
            words = text_options(self.text, str(self.text.get("name")))
        return shlex.join(["int8convert", "verify", out, *words, *gate_options(asdict(self.gates), has_tasks)])


def read_earlier(out: Path) -> dict[str, Any]:
    """Read the verify.json of a checkpoint; {} if there is none.

    Raises:
        CorruptFileError, SourceError: it cannot be read.
    """
    path = find_file(out, VERIFY_FILE)
    return read_own_json(path) if path is not None else {}


def judge_earlier(report: VerifyReport, earlier: Mapping[str, Any], kept: Sequence[str]) -> tuple[EarlierFailure, ...]:
    """Return the failures in an earlier verify.json that the report does not clear.

    Args:
        report: the report of the current run.
        earlier: the parsed verify.json that was there before.
        kept: the parts of it that are kept in the new one, as those that passed are.
    """
    found = [*_carried_along(earlier), *_of_last_run(earlier)]
    judged = [failure for failure in (_judge(failure, report, kept) for failure in found) if failure is not None]
    others = [failure for failure in judged if failure.status is Status.OTHER_FILES]
    ours = [failure for failure in judged if failure.status is not Status.OTHER_FILES]
    if len(ours) > _MOST:
        ours = _without_weaker(ours)
    return (*others[-_MOST:], *ours)


def _without_weaker(failures: Sequence[EarlierFailure]) -> list[EarlierFailure]:
    """Leave out what is cleared whenever another one is; the last of those that are the same stays."""
    kept: list[EarlierFailure] = []
    for failure in reversed(failures):
        if not any(_is_implied(failure, other) for other in kept):
            kept = [other for other in kept if not _is_implied(other, failure)] + [failure]
    return kept[::-1]


def _is_implied(failure: EarlierFailure, other: EarlierFailure) -> bool:
    """Whether a run that clears the other one clears this, too."""
    is_on_less = all(other.measured.get(name, 0) >= n for name, n in failure.measured.items())
    is_alike = failure.level == other.level and failure.status is other.status and failure.files == other.files
    is_covered = failure.level == "tasks" or _is_as_hard(other.text, failure.text)
    return is_alike and is_on_less and is_covered and _is_as_strict(other.gates, failure.gates)


def _is_as_hard(text: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a model reads the same text as the other time, cut in the same way, in windows that are as long.

    Entries that an early version did not write are not compared.
    """
    is_same = all(text.get(name) == other[name] for name in ("sha256", "convention") if name in other)
    length, needed = text.get("length"), other.get("length", 0)
    return is_same and "sha256" in other and is_size(length) and (not is_size(needed) or length >= needed)


def is_same_model(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two lists of files and their sha256 have the same weights, config and stored columns."""
    names = _deciding(one) | _deciding(other)
    if not all(any(name.endswith(".safetensors") and "/" not in name for name in files) for files in (one, other)):
        # Written by an early version, which named the manifest in the place of the weights.
        names = {name for name in names if "/" in name or name == CONFIG_NAME} | {MANIFEST_NAME}
    return bool(names) and all(one.get(name) == other.get(name) for name in names)


def _deciding(files: Mapping[str, str]) -> set[str]:
    return {name for name in files if name == CONFIG_NAME or name.endswith(".safetensors")}


def _judge(failure: EarlierFailure, report: VerifyReport, kept: Sequence[str]) -> EarlierFailure | None:
    if not report.files:  # the checkpoint could not even be opened
        return failure
    if not is_same_model(failure.files, report.files):
        return replace(failure, status=Status.OTHER_FILES)
    check = _tasks_checker(failure, report) if failure.level == "tasks" else _fidelity_checker(failure, report)
    if check is None:  # the run did not measure it again, or on less
        is_overruled = failure.status is Status.OVERRULED and failure.level in kept
        return failure if is_overruled else replace(failure, status=Status.STANDS)
    if check(failure.gates):
        return None
    if check(report.gates):
        return replace(failure, status=Status.OVERRULED)
    return None if _is_as_strict(report.gates, failure.gates) else replace(failure, status=Status.STANDS)


_Checker = Callable[[Gates], bool]
"""Function that says whether a run kept the given gates."""


def _fidelity_checker(failure: EarlierFailure, report: VerifyReport) -> _Checker | None:
    runs = {run.mode: run for run in report.fidelity}
    if report.text is None or not _is_as_hard(asdict(report.text), failure.text):
        return None
    if not all(mode in runs and runs[mode].n_tokens >= n for mode, n in failure.measured.items()):
        return None
    return lambda gates: not any(list(gates.failures(runs[mode])) for mode in failure.measured)


def _tasks_checker(failure: EarlierFailure, report: VerifyReport) -> _Checker | None:
    tasks = {f"{task.task} {task.metric}": task for task in report.tasks}
    if not all(name in tasks and tasks[name].n_samples >= n for name, n in failure.measured.items()):
        return None
    return lambda gates: not any(list(gates.task_failures(tasks[name])) for name in failure.measured)


def _is_as_strict(gates: Gates, other: Gates) -> bool:
    return gates.max_dnll <= other.max_dnll and gates.max_kl <= other.max_kl and gates.min_task_p >= other.min_task_p


def _of_last_run(earlier: Mapping[str, Any]) -> Iterator[EarlierFailure]:
    """Yield the gates that the last run broke."""
    lines = _texts(earlier.get("failures"))
    runs = [run for run in _list(earlier.get("fidelity")) if any(_is_of(line, run) for line in lines)]
    tasks = [
        task
        for task in _list(earlier.get("tasks"))
        if any(line.startswith(f"tasks: {task.get('task')} {task.get('metric')} ") for line in lines)
    ]
    for level, start, measured in (
        ("fidelity", "fidelity (", {run.get("mode"): run.get("n_tokens") for run in runs}),
        ("tasks", "tasks: ", {f"{task.get('task')} {task.get('metric')}": task.get("n_samples") for task in tasks}),
    ):
        told = {
            **{"level": level, "tool": earlier.get("tool"), "gates": earlier.get("gates")},
            **{"failures": [line for line in lines if line.startswith(start)], "measured": measured},
            **{"text": earlier.get("text"), "files": earlier.get("files")},
        }
        if (failure := _parse(told)) is not None:
            yield failure


def _is_of(line: str, run: Mapping[str, Any]) -> bool:
    return line.startswith(f"fidelity ({run.get('mode')}): ")


def _carried_along(earlier: Mapping[str, Any]) -> Iterator[EarlierFailure]:
    for told in _list(earlier.get("earlier_failures")):
        if (failure := _parse(told)) is not None:
            yield failure


def _parse(told: Mapping[str, Any]) -> EarlierFailure | None:
    """Return a failure from its JSON; None if malformed or impossible to clear."""
    failures = _texts(told.get("failures"))[:_MAX_LINES]
    gates, text, measured, files = (_object(told.get(name)) for name in ("gates", "text", "measured", "files"))
    limits = {gate.name: _number(gates.get(gate.name, gate.default)) for gate in fields(Gates)}
    is_whole = all(map(bool, (failures, gates, measured, files))) and told.get("level") in ("fidelity", "tasks")
    are_sizes = all(isinstance(key, str) and is_size(n) for key, n in measured.items())
    are_hashes = all(isinstance(value, str) for value in files.values())
    if not is_whole or not are_sizes or not are_hashes or None in limits.values():
        return None
    return EarlierFailure(
        level=str(told["level"]),
        tool=str(told.get("tool"))[:40],
        failures=tuple(line[:300] if line.isprintable() else quoted(line, 300)[1:-1] for line in failures),
        gates=Gates(**{name: limit for name, limit in limits.items() if limit is not None}),
        text={name: text[name] for name in _TEXT_ENTRIES if isinstance(text.get(name), str | bool | int)},
        measured=measured,
        files={name: files[name] for name in files if name in {*_deciding(files), MANIFEST_NAME}},
        status=Status.OVERRULED if told.get("status") == Status.OVERRULED else Status.STANDS,
    )


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """Return a gate from its JSON, where infinity is a text; None if malformed."""
    if value in ("inf", "-inf"):
        return float(value)
    if type(value) not in (int, float) or abs(value) > 1e308 or math.isnan(value):
        return None
    return float(value)


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
