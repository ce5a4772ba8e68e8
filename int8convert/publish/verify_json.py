"""verify.json: what `verify` found of a checkpoint, as it is written, read back and measured again.

docs/verify-json.md describes the form. The file may come from a stranger, and early versions wrote fewer entries. So an
entry is used only if it has the type and size that `verify` writes, and a missing one counts as unknown.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import make_folder, write_json
from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import CONFIG_NAME, MANIFEST_NAME, VERIFY_FILE, find_file
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
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


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that the levels above the exact one must keep.

    Attributes:
        max_dnll: upper bound of the 95 % interval of the mean difference in negative log-likelihood, nats a token.
        max_kl: mean Kullback-Leibler divergence from the source's predictions, nats a token.
        min_task_p: p-value below which a worse task score fails, 0 to 1.

    Raises:
        ValueError: a gate is NaN.
    """

    max_dnll: float = 0.01
    max_kl: float = 0.01
    min_task_p: float = 0.001

    def __post_init__(self) -> None:
        if any(map(math.isnan, astuple(self))):
            raise ValueError(f"gates must be numbers, found {self}")

    def is_as_strict_as(self, other: Gates) -> bool:
        """Return whether everything that keeps these gates keeps the others."""
        is_near = self.max_dnll <= other.max_dnll and self.max_kl <= other.max_kl
        return is_near and self.min_task_p >= other.min_task_p


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


def clearing_command(out: Path) -> str:
    """Return the `int8convert verify` that lets a checkpoint pass once it passes itself.

    For a gate that was broken, the command measures on the same text with the same gates; else it is the plain one.
    """
    try:
        failures = failures_on_record(read_verify_json(out))
    except (CorruptFileError, SourceError):
        failures = []
    commands = (failure.command(str(out)) for failure in failures if failure.status is Status.STANDS)
    return next(commands, shlex.join(["int8convert", "verify", str(out)]))


def text_options(text: Mapping[str, Any], file_name: str) -> list[str]:
    """Return the options by which models read the same windows of the same text.

    Args:
        text: the entry `text` of a verify.json.
        file_name: what the command calls a text of the user's own.
    """
    words = []
    if text.get("dataset"):
        words = ["--dataset", str(text["dataset"])]
    elif not text.get("is_default"):
        words = ["--text", file_name]
    for option, name in (("--sequences", "n_sequences"), ("--length", "length")):
        words += [option, str(text[name])] if is_size(text.get(name)) else []
    convention = name_of_convention(text)
    is_usual = convention == ("contiguous" if text.get("dataset") else "spread")
    return words if is_usual or not convention.isalpha() else [*words, "--convention", convention]


def name_of_convention(text: Mapping[str, Any]) -> str:
    """Return how a text was cut, without the numbers that `verify` adds."""
    return str(text.get("convention", "spread")).partition(":")[0]


def task_options(names: Iterable[str]) -> list[str]:
    """Return the options by which models answer these zero-shot tasks."""
    return ["--level", "tasks", "--tasks", ",".join(dict.fromkeys(names))]


def gate_options(gates: Mapping[str, Any], has_tasks: bool) -> list[str]:
    """Return the options for gates that differ from the defaults.

    Args:
        gates: the entry `gates` of a verify.json; infinite numbers may be strings.
        has_tasks: whether tasks are measured, and their gate matters.
    """
    known = [gate for gate in fields(Gates) if has_tasks or gate.name != "min_task_p"]
    limits = [(gate, float(gates.get(gate.name, gate.default))) for gate in known]
    given = [(f"--{gate.name.replace('_', '-')}", f"{limit:g}") for gate, limit in limits if limit != gate.default]
    return [word for option in given for word in option]


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
