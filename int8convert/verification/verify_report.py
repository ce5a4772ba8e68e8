"""The report of `verify`: what was found, and whether it passes. docs/verify-json.md describes its JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.publish.verify_command import Gates, Undecided
from int8convert.publish.verify_json import EarlierFailure, Status, Verdict
from int8convert.sources import is_repository_name
from int8convert.text import counted, format_bytes
from int8convert.verification.checks import Check
from int8convert.verification.exact.level import ExactReport
from int8convert.verification.verdict import fidelity_failures, task_failures, undecided_measurements

if TYPE_CHECKING:
    from int8convert.verification.causes import Causes, Remedy
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.tasks import TaskReport


_N_NAMED = 5
"""Number of the costliest modules that are named."""

_LARGE_RATIO = 10
"""Ratio from which no decimals are printed."""


@dataclass(frozen=True, slots=True)
class TextUsed:
    """The text that the models read.

    Attributes:
        name, sha256: name and hash of the file.
        description: what the text is, for people.
        n_text_tokens: tokens of the whole text.
        n_sequences, length: number of windows, and tokens of each.
        convention: how the text was cut, and what perplexity means then.
        dataset: name of a published dataset; None for another text.
    """

    name: str
    sha256: str
    description: str
    is_default: bool
    n_text_tokens: int
    n_sequences: int
    length: int
    convention: str
    dataset: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of `verify`.

    Attributes:
        out: the int8 checkpoint, as the caller named it.
        level: the requested level; the levels before it come first, and one that does not pass is the last.
        files: sha256 of each file of the checkpoint that was examined. If one changes, the report no longer applies.
        text: what the models read; None if they did not run.
        fidelity: a report for each arithmetic that ran; empty if that level was not reached.
        sweep: the same at several outlier thresholds, if asked for; no gate applies to it.
        causes: why the predictions differ; None if the models did not run in memory, or have no gradient.
        tasks: a report for each metric of each task; empty if that level was not reached.
        reference: the source: a repository on the Hub, or a directory; None if `out` cannot be opened.
        earlier_failures: failures of earlier runs that this one does not clear.
        failures: one line for each defect, earlier failures that stand included.
        undecided: each measurement that is too small to say whether it keeps its gate.
    """

    tool: str
    out: str
    level: str
    gates: Gates
    files: dict[str, str]
    exact: ExactReport
    text: TextUsed | None = None
    fidelity: tuple[FidelityReport, ...] = ()
    sweep: tuple[FidelityReport, ...] = ()
    causes: Causes | None = None
    tasks: tuple[TaskReport, ...] = ()
    reference: str | None = None
    elapsed_s: float = 0.0
    earlier_failures: tuple[EarlierFailure, ...] = ()
    failures: tuple[str, ...] = field(init=False)
    undecided: tuple[Undecided, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = [line for check in self.exact.checks if not check.is_passed for line in _describe(check)]
        found += [line for report in self.fidelity for line in fidelity_failures(self.gates, report)]
        found += [line for task in self.tasks for line in task_failures(self.gates, task)]
        found += [line for earlier in self.standing for line in earlier.lines()]
        undecided = [each for report in self.fidelity for each in undecided_measurements(self.gates, report)]
        object.__setattr__(self, "failures", tuple(found))
        object.__setattr__(self, "undecided", tuple(undecided))

    @property
    def standing(self) -> tuple[EarlierFailure, ...]:
        """Earlier failures that keep the checkpoint from passing, whatever this run found."""
        return tuple(earlier for earlier in self.earlier_failures if earlier.status is Status.STANDS)

    @property
    def verdict(self) -> Verdict:
        if self.failures:
            return Verdict.FAILED
        return Verdict.UNDECIDED if self.undecided else Verdict.PASSED

    @property
    def is_passed(self) -> bool:
        return self.verdict is Verdict.PASSED

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; numbers that JSON cannot hold are strings: "inf", "nan"."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        first = {"schema": 1, "is_passed": self.is_passed, "verdict": str(self.verdict)}
        found = {name: values.pop(name) for name in ("failures", "undecided")}
        result: dict[str, Any] = _plain({**first, **found, **values})
        result["exact"]["is_passed"] = self.exact.is_passed
        del result["exact"]["files"]  # the same as those of the whole report
        return result

    def to_published_json(self) -> dict[str, Any]:
        """Return the same without paths of this machine: directories by their last name."""
        result = self.to_json()
        result["out"] = result["exact"]["out"] = Path(self.out).resolve().name
        if self.reference is not None:
            is_repository = is_repository_name(self.reference)
            result["reference"] = self.reference if is_repository else Path(self.reference).resolve().name
        result["exact"]["reference"] = result["reference"]
        if result["causes"] is not None and result["causes"]["remedy"] is not None:
            del result["causes"]["remedy"]["command"]
        return result


def fidelity_rows(reports: Sequence[FidelityReport]) -> list[tuple[str, list[str]]]:
    """Return rows for people: label, and the value of each arithmetic."""
    rows: list[tuple[str, Callable[[FidelityReport], str]]] = [
        ("outlier threshold", lambda r: "none" if r.threshold is None else f"{r.threshold:g}"),
        ("columns in 16 bits", lambda r: f"{100 * r.outlier_share:.1f} %"),
        ("perplexity, source", lambda r: f"{r.reference_perplexity:,.6g}"),
        ("perplexity, int8", lambda r: f"{r.perplexity:,.6g}"),
        ("delta-NLL", lambda r: f"{r.delta_nll:+.6f}"),
        ("  95 % interval", lambda r: f"{r.delta_nll_interval[0]:+.6f} to {r.delta_nll_interval[1]:+.6f}"),
        ("KL, mean", lambda r: f"{r.mean_kl:.6f}"),
        ("  95 % interval", lambda r: f"{r.mean_kl_interval[0]:.6f} to {r.mean_kl_interval[1]:.6f}"),
        ("KL, median", lambda r: f"{r.median_kl:.6f}"),
        ("KL, 99 %", lambda r: f"{r.p99_kl:.6f}"),
        ("KL, 99.9 %", lambda r: f"{r.p999_kl:.6f}"),
        ("same top token", lambda r: f"{100 * r.same_top1:.1f} %"),
        ("delta-p, rms", lambda r: f"{r.delta_p:.6f}"),
        ("streamed", lambda r: "yes" if r.streamed else "no"),
        ("peak memory", lambda r: f"{r.peak_memory_bytes / 1e6:,.0f} MB"),
        ("time", lambda r: f"{r.seconds:,.1f} s"),
    ]
    return [(label, [shown(report) for report in reports]) for label, shown in rows]


def cause_rows(causes: Causes) -> list[tuple[str, str, str, str, str]]:
    """Return rows for people: kind, modules, damage by weights and by inputs, share; all modules last."""
    whole = causes.weights + causes.inputs
    rows = [
        (each.name, f"{each.n_modules}", f"{each.weights:.2g}", f"{each.inputs:.2g}", f"{each.cost / whole:.0%}")
        for each in causes.kinds
        if whole > 0
    ]
    return [*rows, ("all", "", f"{causes.weights:.2g}", f"{causes.inputs:.2g}", "")]


def cause_lines(report: VerifyReport) -> Iterator[str]:
    """Yield in words which modules cause a divergence, how it compares with the source's rounding, and what to do."""
    causes = report.causes
    if causes is None:
        return
    measured = next(each for each in report.fidelity if each.mode == causes.mode)
    whole = causes.weights + causes.inputs
    if whole > 0:
        costliest = ", ".join(f"{each.name} {each.cost / whole:.0%}" for each in causes.modules[:_N_NAMED])
        yield f"costliest modules: {costliest}"
    if causes.source_rounding:
        yield (
            f"the source's own rounding to {causes.source_dtype} costs about {causes.source_rounding:.2g}: the mean KL "
            f"is {_times(measured.mean_kl / causes.source_rounding)} that, the gate "
            f"{_times(report.gates.max_kl / causes.source_rounding)}"
        )
    if causes.remedy is not None:
        yield from _remedy_lines(causes.remedy, measured.mean_kl)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= _LARGE_RATIO else f"{ratio:.2g} times"


def _remedy_lines(remedy: Remedy, mean_kl: float) -> Iterator[str]:
    kept = f"{counted(len(remedy.keep), 'module')} in 16 bits, {remedy.share:.1%} of the int8 weights"
    outcome = "within the gates" if remedy.is_enough else "which is not yet within the gates"
    yield (
        f"what next: keep {kept}, for {format_bytes(remedy.n_bytes)} more; the mean KL is expected to fall "
        f"from {mean_kl:.2g} to {remedy.mean_kl:.2g}, {outcome}"
    )
    yield remedy.command or f"convert again with {' '.join(f'--skip {name}' for name in remedy.keep)}, and export that"


def _describe(check: Check) -> Iterator[str]:
    """Yield a line for each of the first findings, and one with the number of the others."""
    n_shown = 3
    for finding in check.findings[:n_shown]:
        yield f"{check.name}: {finding}"
    if check.n_findings > n_shown:
        yield f"{check.name}: and {check.n_findings - n_shown:,} more tensors or files"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
