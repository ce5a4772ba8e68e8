"""The gates of `verify`: what the levels above the exact one must not exceed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.tasks import TaskReport


@dataclass(frozen=True, slots=True)
class Gates:
    """What the levels above the exact one must not exceed.

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

    def task_failures(self, report: TaskReport) -> Iterator[str]:
        """Yield a line if a task's score is worse, and not by chance."""
        if report.is_worse and report.p_value is not None and report.p_value < self.min_task_p:
            yield (
                f"tasks: {report.task} {report.metric} is {report.int8:.4f}, expected {report.reference:.4f} as of the "
                f"source; of {report.n_samples:,} questions {report.n_only_reference:,} are lost and "
                f"{report.n_only_int8:,} won, by chance with p = {report.p_value:.2g}"
            )

    def failures(self, report: FidelityReport) -> Iterator[str]:
        """Yield a line for each gate that is exceeded. NaN exceeds a gate."""
        upper = report.delta_nll_interval[1]
        if not upper <= self.max_dnll:
            yield (
                f"fidelity ({report.mode}): delta-NLL is {report.delta_nll:.4g}, at 95 % confidence up to {upper:.4g}, "
                f"expected at most {self.max_dnll:g}"
            )
        if not report.mean_kl <= self.max_kl:
            yield f"fidelity ({report.mode}): mean KL is {report.mean_kl:.4g}, expected at most {self.max_kl:g}"
