"""The verdict on a measurement: it keeps its gate, breaks it, or is too small to say.

A mean over tokens passes if its whole 95 % interval is at or below the gate. It fails if the whole interval is above
the gate. Otherwise chance may decide on which side the mean is, and the verdict is that too few tokens were measured.

With n windows, h half the width of the interval, and d the distance of the mean from the gate, this number of windows
would do:

    2 n (h / d)^2

It assumes that mean and spread stay as they are. Then h shrinks with the square root of the number of windows. Without
the factor of 2 the interval would just reach the gate: in simulations with normal and with skewed windows, 40 % of such
runs were undecided again, and 30 % with it. Estimates from fewer than 8 windows are too high.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from int8convert.publish.verify_command import Gates, Undecided
from int8convert.publish.verify_json import Verdict, fidelity_line, task_line

if TYPE_CHECKING:
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.tasks import TaskReport

_MARGIN = 2
_AT_GATE = 0.01
"""Distance from the gate at which a mean counts as being at it, in half widths of its interval."""

_FEWEST_WINDOWS = 16
"""Number of windows to measure after a single one, whose interval is infinite."""


@dataclass(frozen=True, slots=True)
class _Gated:
    """A mean, its interval and its gate. `name` is the gate's, a field of `Gates`."""

    label: str
    mean: float
    interval: tuple[float, float]
    name: str
    gate: float

    @property
    def verdict(self) -> Verdict:
        low, high = self.interval
        if any(map(math.isnan, (self.mean, low, high))) or low > self.gate:
            return Verdict.FAILED
        return Verdict.PASSED if high <= self.gate else Verdict.UNDECIDED

    def windows_that_would_do(self, n_windows: int) -> int | None:
        """Return the number of windows that would decide; None if no number would."""
        if n_windows < 2:
            return _FEWEST_WINDOWS
        half, away = (self.interval[1] - self.interval[0]) / 2, abs(self.mean - self.gate)
        if away < _AT_GATE * half:
            return None
        return math.ceil(_MARGIN * n_windows * (half / away) ** 2)


def _gated(gates: Gates, report: FidelityReport) -> tuple[_Gated, _Gated]:
    return (
        _Gated("delta-NLL", report.delta_nll, report.delta_nll_interval, "max_dnll", gates.max_dnll),
        _Gated("mean KL", report.mean_kl, report.mean_kl_interval, "max_kl", gates.max_kl),
    )


def fidelity_verdict(gates: Gates, report: FidelityReport) -> Verdict:
    """Return the verdict on one arithmetic: failed if one of its means fails, passed if both pass."""
    verdicts = {each.verdict for each in _gated(gates, report)}
    return next(verdict for verdict in (Verdict.FAILED, Verdict.UNDECIDED, Verdict.PASSED) if verdict in verdicts)


def keeps_gates(gates: Gates, report: FidelityReport) -> bool:
    """Return whether no mean of one arithmetic fails. One that too few tokens were measured for does not."""
    return fidelity_verdict(gates, report) is not Verdict.FAILED


def fidelity_failures(gates: Gates, report: FidelityReport) -> Iterator[str]:
    """Yield a line for each gate that is exceeded. NaN exceeds a gate."""
    for each in _gated(gates, report):
        if each.verdict is Verdict.FAILED:
            yield (
                f"{fidelity_line(report.mode)}{each.label} is {each.mean:.4g}, at 95 % confidence at least "
                f"{each.interval[0]:.4g}, expected at most {each.gate:g}"
            )


def undecided_measurements(gates: Gates, report: FidelityReport) -> Iterator[Undecided]:
    """Yield each mean whose interval its gate is in."""
    for each in _gated(gates, report):
        if each.verdict is Verdict.UNDECIDED:
            n = each.windows_that_would_do(report.n_sequences)
            n_tokens = n and math.ceil(n * report.n_tokens / report.n_sequences)
            advice = "no number of tokens would do, because the mean is at the gate"
            if n is not None:
                assumed = " if mean and spread stay as they are" if report.n_sequences > 1 else ""
                advice = f"about {n_tokens:,} tokens in {n:,} windows would do{assumed}"
            yield Undecided(
                f"{fidelity_line(report.mode)}{each.label} is {each.mean:.4g}, at 95 % confidence between "
                f"{each.interval[0]:.4g} and {each.interval[1]:.4g}, expected at most {each.gate:g}; {advice}",
                each.name,
                n,
                n_tokens,
            )


def task_failures(gates: Gates, report: TaskReport) -> Iterator[str]:
    """Yield a line if a task's score is worse, and not by chance."""
    if report.is_worse and report.p_value is not None and report.p_value < gates.min_task_p:
        yield (
            f"{task_line(report.task, report.metric)}is {report.int8:.4f}, expected {report.reference:.4f} as of the "
            f"source; of {report.n_samples:,} questions {report.n_only_reference:,} are lost and "
            f"{report.n_only_int8:,} won, by chance with p = {report.p_value:.2g}"
        )
