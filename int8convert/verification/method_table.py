"""The paper's Table 1 for one model and one text: what each int8 method would leave of its predictions.

Simulated on the source in floating point, see `baselines`, and judged by the statistics of `paired_statistics`. The
reference's own row comes first. Does not know what the int8 checkpoint computes: that is measured, not simulated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from int8convert.runtime.device import choose_device
from int8convert.runtime.models import check_length, load_model
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.baselines import compare_methods
from int8convert.verification.fidelity.paired_statistics import Interval, PairedStatistics


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method; the numbers as in `paired_statistics.PairedSummary`."""

    method: str
    perplexity: float
    delta_nll: float
    delta_nll_interval: Interval
    mean_kl: float
    same_top1: float


def make_method_table(
    reference: str | os.PathLike[str],
    windows: TokenWindows,
    *,
    threshold: float,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[MethodRow, ...]:
    """All methods on the same windows, of which every token but the first is predicted.

    Args:
        reference: the source's directory; it has to fit in memory.
        threshold: magnitude from which a column is an outlier, for the methods that decompose.

    Raises:
        Int8ConvertError: the source cannot be loaded, or takes no windows of this length.
    """
    model = load_model(reference, choose_device(device), trust_remote_code=trust_remote_code)
    check_length(model, windows)
    rows = compare_methods(model, list(windows.ids), PairedStatistics, threshold=threshold)
    summaries = {name: statistics.summarize() for name, statistics in rows.items()}
    return tuple(
        MethodRow(name, s.perplexity, s.delta_nll, s.delta_nll_interval, s.mean_kl, s.same_top1)
        for name, s in summaries.items()
    )
