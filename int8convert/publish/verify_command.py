"""The gates of `verify`, and the options of the command that measures the same again, or more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from int8convert.checkpoint.stored_tensor import is_size


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that the levels above the exact one must keep.

    Attributes:
        max_dnll: limit of the mean difference in negative log-likelihood, nats a token.
        max_kl: limit of the mean Kullback-Leibler divergence from the source's predictions, nats a token.
        min_task_p: p-value below which a worse task score fails, 0 to 1.

    `verification.verdict` says when a mean keeps its limit.

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


@dataclass(frozen=True, slots=True)
class Undecided:
    """A measurement that is too small to say whether it keeps its gate.

    Attributes:
        line: the measurement, its gate and what would do, in words.
        gate: name of the gate, a field of `Gates`.
        n_sequences, n_tokens: number of windows that would do, and of tokens in them; None if no number would.
    """

    line: str
    gate: str
    n_sequences: int | None
    n_tokens: int | None


@dataclass(frozen=True, slots=True)
class DecidingRun:
    """What to change in a command whose measurements were too small.

    Attributes:
        n_sequences: number of windows; None for those of the command.
        needs_longer_text: the text has fewer tokens than these windows.
        length: tokens of a window; None if unknown.
        gates: names of the gates that no number of windows would do for.
    """

    n_sequences: int | None
    needs_longer_text: bool
    length: int | None
    gates: tuple[str, ...]

    def options(self) -> list[str]:
        """Return the options to change."""
        words = ["--sequences", str(self.n_sequences)] if self.n_sequences is not None else []
        if self.needs_longer_text:  # whose windows would have another length by default
            words = ["--text", "FILE", *words, "--length", str(self.length)]
        return words + self._other_gates()

    def all_options(self, text: Mapping[str, Any], gates: Mapping[str, Any]) -> list[str]:
        """Return all options of the command.

        Args:
            text, gates: these entries of a verify.json.
        """
        if self.n_sequences is not None:
            text = {**text, "n_sequences": self.n_sequences}
        if self.needs_longer_text:
            text = {**text, "dataset": None, "is_default": False, "name": "FILE"}
        kept = {name: limit for name, limit in gates.items() if name not in self.gates}
        return [*text_options(text, str(text.get("name"))), *gate_options(kept, False), *self._other_gates()]

    def _other_gates(self) -> list[str]:
        return [word for name in self.gates for word in (_option(name), "X")]


def deciding_run(undecided: Sequence[Undecided], text: Mapping[str, Any]) -> DecidingRun:
    """Return the run that would decide.

    Args:
        text: the entry `text` of a verify.json.
    """
    n = max((each.n_sequences for each in undecided if each.n_sequences is not None), default=None)
    gates = dict.fromkeys(each.gate for each in undecided if each.n_sequences is None)
    length = text["length"] if is_size(text.get("length")) else None
    return DecidingRun(n, n is not None and not _has_windows(text, n), length, tuple(gates))


def _has_windows(text: Mapping[str, Any], n_sequences: int) -> bool:
    """Return whether a text is long enough for so many windows; True if its length is unknown."""
    length: Any = text.get("length")
    n_tokens: Any = text.get("n_text_tokens")
    if not is_size(length) or not is_size(n_tokens):
        return True
    step = length // 2 if name_of_convention(text) == "strided" else length
    return bool((n_sequences - 1) * step + length <= n_tokens)


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
    given = [(_option(gate.name), f"{limit:g}") for gate, limit in limits if limit != gate.default]
    return [word for option in given for word in option]


def _option(gate: str) -> str:
    return f"--{gate.replace('_', '-')}"
