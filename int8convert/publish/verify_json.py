"""verify.json: what `verify` found of a checkpoint, as it is written, read back and measured again.

docs/verify-json.md describes the form. The file may come from a stranger, and early versions wrote fewer entries. So an
entry is used only if it has the type and size that `verify` writes, and a missing one counts as unknown.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import make_folder, write_json
from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import CONFIG_NAME, MANIFEST_NAME, VERIFY_FILE, find_file
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
from int8convert.publish.verify_command import (
    Gates,
    Undecided,
    deciding_run,
    gate_options,
    task_options,
    text_options,
)
from int8convert.text import quoted

_MAX_LINES = 10
_TEXT_ENTRIES = ("name", "sha256", "dataset", "is_default", "n_sequences", "length", "convention")
_COUNTS = frozenset(
    {
        *("n_int8_weights", "n_different_codes", "n_different_scales", "n_sequences", "length", "n_tokens"),
        *("n_text_tokens", "n_samples", "n_only_reference", "n_only_int8"),
    }
)
_NUMBERS = frozenset(
    {
        *("perplexity", "reference_perplexity", "delta_nll", "mean_kl", "same_top1", "threshold", "outlier_share"),
        *("reference", "int8", "p_value"),
    }
)
_NOT_FINITE = ("inf", "-inf", "nan")
"""Spellings of the numbers that JSON cannot hold."""


class Verdict(StrEnum):
    """What `verify` says of a checkpoint: too few tokens were measured if it is undecided."""

    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


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
        text: the text that the models read; the entries of `TextUsed` that tell texts apart.
        measured: size of each measurement that broke a gate: mode -> tokens, or task and metric -> questions.
        files: sha256 of each file that decides what the model computes.
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


def write_verify_json(out: Path, report: Mapping[str, Any]) -> Path:
    """Write the file, whole or not at all; return its path."""
    path = out / VERIFY_FILE
    make_folder(path.parent)
    write_json(path, report)
    return path


def read_verify_json(out: Path) -> dict[str, Any]:
    """Parse the verify.json of a checkpoint; return {} if there is none.

    Raises:
        CorruptFileError, SourceError: the file cannot be read.
    """
    path = find_file(out, VERIFY_FILE)
    return read_own_json(path) if path is not None else {}


def read_recorded_report(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a parsed verify.json with its gates as numbers; None if `verify` did not write it."""
    gates, exact = report.get("gates", {}), report.get("exact", {})
    text, runs, tasks = report.get("text"), report.get("fidelity", []), report.get("tasks", [])
    objects = [gates, exact, {} if text is None else text]
    if not isinstance(runs, list) or not isinstance(tasks, list):
        return None
    if not all(isinstance(value, dict) for value in (*objects, *runs, *tasks)):
        return None
    limits = {gate.name: gates[gate.name] for gate in fields(Gates) if gate.name in gates}
    if not all(map(_is_number, limits.values())) or not all(map(_has_counts, (exact, objects[2], *runs, *tasks))):
        return None
    if not all(map(_has_numbers, (*runs, *tasks))):
        return None
    return {**report, "gates": {name: float(limit) for name, limit in limits.items()}}


def failures_on_record(report: Mapping[str, Any]) -> list[EarlierFailure]:
    """Return the failures in a parsed verify.json: those of earlier runs, then those of the last run."""
    told = [*_list(report.get("earlier_failures")), *_failures_of_last_run(report)]
    return [failure for failure in map(_parse_failure, told) if failure is not None]


def undecided_on_record(report: Mapping[str, Any]) -> list[Undecided]:
    """Return what a parsed verify.json says was too small to decide; [] unless that is its verdict."""
    if report.get("verdict") != Verdict.UNDECIDED:
        return []
    found = [_parse_undecided(entry) for entry in _list(report.get("undecided"))[:_MAX_LINES]]
    return [each for each in found if each is not None]


def clearing_command(out: Path) -> str:
    """Return the `int8convert verify` that lets a checkpoint pass once it passes itself.

    For a gate that was broken, the command measures on the same text with the same gates. For too few tokens it
    measures more of them. Otherwise it is the plain one.
    """
    try:
        report = read_verify_json(out)
    except (CorruptFileError, SourceError):
        report = {}
    commands = [failure.command(str(out)) for failure in failures_on_record(report) if failure.status is Status.STANDS]
    if commands:
        return commands[0]
    words: list[str] = []
    if undecided := undecided_on_record(report):
        text, gates = _object(report.get("text")), _object(report.get("gates"))
        limits = {name: limit for name, limit in gates.items() if _is_number(limit)}
        words = deciding_run(undecided, text).all_options(text, limits)
    return shlex.join(["int8convert", "verify", str(out), *words])


def deciding_files(files: Iterable[str]) -> set[str]:
    """Return the names of the files that decide what the model computes."""
    return {name for name in files if name == CONFIG_NAME or name.endswith(".safetensors")}


def fidelity_line(mode: object) -> str:
    """Return how a line on a broken gate of the fidelity level begins."""
    return f"fidelity ({mode}): "


def task_line(task: object, metric: object) -> str:
    """Return how a line on a task that got worse begins."""
    return f"tasks: {task} {metric} "


def _failures_of_last_run(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the gates that the last run broke, in the form of an entry of `earlier_failures`."""
    lines = _texts(report.get("failures"))
    runs = {
        str(run.get("mode")): run.get("n_tokens")
        for run in _list(report.get("fidelity"))
        if any(line.startswith(fidelity_line(run.get("mode"))) for line in lines)
    }
    tasks = {
        f"{task.get('task')} {task.get('metric')}": task.get("n_samples")
        for task in _list(report.get("tasks"))
        if any(line.startswith(task_line(task.get("task"), task.get("metric"))) for line in lines)
    }
    common = {name: report.get(name) for name in ("tool", "gates", "text", "files")}
    for level, measured in (("fidelity", runs), ("tasks", tasks)):
        yield {
            **common,
            "level": level,
            "failures": [line for line in lines if line.startswith(level)],
            "measured": measured,
            "status": "stands",
        }


def _parse_failure(told: Mapping[str, Any]) -> EarlierFailure | None:
    """Return a failure from its JSON; None if malformed or impossible to clear."""
    failures = _texts(told.get("failures"))[:_MAX_LINES]
    gates, text, measured, files = (_object(told.get(name)) for name in ("gates", "text", "measured", "files"))
    limits = [gates.get(gate.name, gate.default) for gate in fields(Gates)]
    is_whole = all(map(bool, (failures, gates, measured, files))) and told.get("level") in ("fidelity", "tasks")
    are_sizes = all(isinstance(key, str) and is_size(n) for key, n in measured.items())
    are_hashes = all(isinstance(value, str) for value in files.values())
    are_gates = all(_is_number(limit) and not math.isnan(float(limit)) for limit in limits)
    is_text = all(is_size(text.get(name)) for name in ("n_sequences", "length")) and isinstance(text.get("name"), str)
    is_whole = is_whole and (is_text or told.get("level") == "tasks")
    if not (is_whole and are_sizes and are_hashes and are_gates):
        return None
    status = told.get("status")
    return EarlierFailure(
        level=str(told["level"]),
        tool=str(told.get("tool"))[:40],
        failures=tuple(line[:300] if line.isprintable() else quoted(line, 300)[1:-1] for line in failures),
        gates=Gates(*map(float, limits)),
        text={name: text[name] for name in _TEXT_ENTRIES if isinstance(text.get(name), str | bool | int)},
        measured=measured,
        files={name: files[name] for name in files if name in {*deciding_files(files), MANIFEST_NAME}},
        status=Status(status) if status in tuple(Status) else Status.STANDS,
    )


def _parse_undecided(told: Mapping[str, Any]) -> Undecided | None:
    """Return an undecided measurement from its JSON; None if malformed."""
    line, gate, n_sequences, n_tokens = (told.get(name) for name in ("line", "gate", "n_sequences", "n_tokens"))
    are_sizes = all(n is None or is_size(n) for n in (n_sequences, n_tokens))
    if not isinstance(line, str) or gate not in [gate.name for gate in fields(Gates)] or not are_sizes:
        return None
    return Undecided(line, str(gate), n_sequences, n_tokens)


def _has_counts(entries: Mapping[str, Any]) -> bool:
    return all(entries[key] is None or is_size(entries[key]) for key in _COUNTS & entries.keys())


def _has_numbers(entries: Mapping[str, Any]) -> bool:
    interval = entries.get("delta_nll_interval", [0.0, 0.0])
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        return False
    return all(entries[key] is None or _is_number(entries[key]) for key in _NUMBERS & entries.keys())


def _is_number(value: Any) -> bool:
    return value in _NOT_FINITE or type(value) is float or (type(value) is int and abs(value) < 10**300)


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
