"""Which gates a measurement breaks: one line for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from int8convert.publish.verify_json import Gates, fidelity_line, task_line

if TYPE_CHECKING:
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.tasks import TaskReport


def fidelity_failures(gates: Gates, report: FidelityReport) -> Iterator[str]:
    """Yield a line for each gate that is exceeded. NaN exceeds a gate."""
    upper = report.delta_nll_interval[1]
    if not upper <= gates.max_dnll:
        yield (
            f"{fidelity_line(report.mode)}delta-NLL is {report.delta_nll:.4g}, at 95 % confidence up to {upper:.4g}, "
            f"expected at most {gates.max_dnll:g}"
        )
    if not report.mean_kl <= gates.max_kl:
        yield f"{fidelity_line(report.mode)}mean KL is {report.mean_kl:.4g}, expected at most {gates.max_kl:g}"


def task_failures(gates: Gates, report: TaskReport) -> Iterator[str]:
    """Yield a line if a task's score is worse, and not by chance."""
    if report.is_worse and report.p_value is not None and report.p_value < gates.min_task_p:
        yield (
            f"{task_line(report.task, report.metric)}is {report.int8:.4f}, expected {report.reference:.4f} as of the "
            f"source; of {report.n_samples:,} questions {report.n_only_reference:,} are lost and "
            f"{report.n_only_int8:,} won, by chance with p = {report.p_value:.2g}"
        )
