"""Pictures of a verification: how faithful the model is, where the error begins, how much is int8.

They are narrow, with large letters, so that the page can be read on a phone. Colours and the map of outliers come from
`outliers.figures`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from int8convert.outliers.figures import COLOURS, GREY, MARKERS, draw_map, largest_by_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from int8convert.inspection import Inspection
    from int8convert.outliers.find import OutlierReport
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.verify_report import VerifyReport

_WIDTH = 5.6
_LETTERS = {"font.size": 11, "axes.titlesize": 11.5, "axes.labelsize": 11, "legend.fontsize": 10}
_DIVERGENCES = (("median", "median_kl"), ("mean", "mean_kl"), ("99 %", "p99_kl"), ("99.9 %", "p999_kl"))
_SMALLEST_KL = 1e-9
"""Divergence in nats at which a smaller one is drawn: the axis is logarithmic."""


def report_figures(
    report: VerifyReport, inspection: Inspection, outliers: OutlierReport | None
) -> Iterator[tuple[str, str, Figure]]:
    """Yield (name, content in words, picture) for all that was measured."""
    import matplotlib

    with matplotlib.rc_context(_LETTERS):
        if report.fidelity:
            yield "fidelity", _say_fidelity(report), draw_fidelity(report)
            yield "layer-errors", "The error of the hidden state after each layer", draw_layer_errors(report.fidelity)
        if outliers is not None:
            states = largest_by_layer(outliers)
            if states:
                what = "The largest magnitude of each dimension of the hidden state, layer by layer"
                yield "outlier-map", what, draw_map(outliers, states, _WIDTH)
        yield "coverage", f"{inspection.coverage:.1%} of the parameters are int8", draw_coverage(inspection)


def _say_fidelity(report: VerifyReport) -> str:
    first = report.fidelity[0]
    return (
        f"Mean difference of the log-likelihood {first.delta_nll:+.5f} nats a token, mean KL divergence "
        f"{first.mean_kl:.2g}, beside the gates {report.gates.max_dnll:g} and {report.gates.max_kl:g}"
    )


def draw_fidelity(report: VerifyReport) -> Figure:
    """Draw the difference of the log-likelihood with its interval, and the KL divergence, each beside its gate."""
    from matplotlib.figure import Figure

    n = len(report.fidelity)
    figure = Figure(figsize=(_WIDTH, 3.0 + 0.8 * n), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    names = [each.mode for each in report.fidelity]
    for i, each in enumerate(report.fidelity):
        low, high = (abs(end - each.delta_nll) for end in each.delta_nll_interval)
        error = [[low], [high]] if low + high < float("inf") else None
        top.errorbar(each.delta_nll, i, xerr=error, fmt="o", color=COLOURS[i % len(COLOURS)], capsize=5, linewidth=2)
        for k, (label, name) in enumerate(_DIVERGENCES):
            value = max(getattr(each, name), _SMALLEST_KL)
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[k], "linestyle": ""}
            bottom.plot(value, i, markersize=8, **style, label=label if i == 0 else None)
    top.axvline(0, color=GREY, linewidth=1)
    top.axvline(report.gates.max_dnll, color="black", linestyle="--", linewidth=1.2)
    bottom.axvline(report.gates.max_kl, color="black", linestyle="--", linewidth=1.2)
    bottom.set_xscale("log")
    top.set_title("Difference of log-likelihood, 95 %", loc="left")
    bottom.set_title("KL divergence; the gate is for the interval of the mean", loc="left")
    for axes, gate in ((top, report.gates.max_dnll), (bottom, report.gates.max_kl)):
        _finish(axes, names)
        axes.text(gate, -0.6, f" gate {gate:g}", va="top", fontsize=10)
    bottom.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.25), handletextpad=0.1)
    return figure


def _finish(axes: Any, names: list[str]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.15)


def draw_layer_errors(reports: tuple[FidelityReport, ...]) -> Figure:
    """Draw |difference of the hidden states| / |reference's| after each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for i, each in enumerate(reports):
        errors = [100 * error for _, error in each.layer_errors]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(
            range(len(errors)), errors, **style, markevery=max(1, len(errors) // 16), clip_on=False, label=each.mode
        )
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_title("Relative error of the hidden state, %", loc="left")
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    if len(reports) > 1:
        axes.legend(frameon=False)
    return figure


def draw_coverage(inspection: Inspection) -> Figure:
    """Draw the share of the parameters that is int8, and the reasons of the others."""
    from matplotlib.figure import Figure

    shares = coverage_shares(inspection)
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.42 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOURS[0], *[GREY] * (len(shares) - 1)]
    bars = axes.barh(range(len(shares)), [100 * share for _, share in shares], color=colours, height=0.65)
    axes.bar_label(bars, [f"{100 * share:.1f} %" for _, share in shares], padding=4)
    axes.set_title("Share of the parameters", loc="left")
    axes.set_xlim(0, 115)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_yticks(range(len(shares)), [name for name, _ in shares])
    axes.invert_yaxis()
    return figure


def coverage_shares(inspection: Inspection) -> list[tuple[str, float]]:
    """Return ("int8", share of the parameters), then (reason, share) of all others, the largest first."""
    kept: Counter[str] = Counter()
    for group in inspection.groups:
        if not group.is_scale and group.dtype != "I8":
            kept[group.reason or f"{group.dtype}, without a recorded reason"] += group.n_elements
    rest = [(reason, n / max(1, inspection.n_parameters)) for reason, n in kept.most_common()]
    return [("int8", inspection.coverage), *rest]
