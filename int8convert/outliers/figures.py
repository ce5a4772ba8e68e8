"""Pictures of a model's outliers: where they are, how large, and how they grow with depth.

The colours are those of Okabe and Ito and the map cividis, which people with any kind of colour vision tell apart.
Lines also differ by marker. matplotlib is imported when a picture is drawn, and opens no window.
Source of the palette: M. Okabe, K. Ito, Color Universal Design (2008).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from int8convert.checkpoint.atomic import write_bytes
from int8convert.errors import OutputError, SourceError
from int8convert.outliers.features import layer_of
from int8convert.outliers.find import OutlierReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"
GREY = "#8C8C8C"
_MAX_MAP_COLUMNS = 1024
"""Columns of the map, at most; of neighbouring dimensions the largest is shown."""

_MAX_LABELS = 12
_WIDTH = 9.0
_FORMATS = ("png", "svg")


def prepare_folder(folder: Path) -> None:
    """Make the folder for pictures, before minutes are spent on measuring.

    Raises:
        SourceError: matplotlib is not installed.
        OutputError: the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SourceError(
            "figures need matplotlib, which is not installed",
            "pip install 'int8convert[report]', or leave out --figures",
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _output_error(error, folder) from error


def draw_figures(report: OutlierReport, folder: Path) -> list[Path]:
    """Write each picture of a report as PNG and SVG; return the paths."""
    return write_figures(outlier_figures(report), folder)


def write_figures(figures: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Write pictures as PNG and SVG into a folder that `prepare_folder` made; return the paths."""
    paths = []
    try:
        for name, figure in figures:
            for suffix in _FORMATS:
                paths.append(folder / f"{name}.{suffix}")
                write_bytes(paths[-1], encode_figure(name, figure, suffix))
    except OSError as error:
        raise _output_error(error, folder) from error
    return paths


def encode_figure(name: str, figure: Figure, suffix: str) -> bytes:
    """Return a picture as "png" or "svg", without a date and with names that do not change from run to run."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return buffer.getvalue()


def _output_error(error: OSError, folder: Path) -> OutputError:
    return OutputError(f"figures cannot be written to '{folder}': {error.strerror}", "name another directory")


def outlier_figures(report: OutlierReport) -> Iterator[tuple[str, Figure]]:
    """Yield name and picture: map, magnitude by layer, growth with depth. A model without hidden states has none."""
    states = largest_by_layer(report)
    if states:
        yield "outlier-map", draw_map(report, states)
        yield "magnitude-by-layer", draw_magnitudes(report)
        yield "growth-with-depth", draw_growth(report, states)


def largest_by_layer(report: OutlierReport) -> dict[str, torch.Tensor]:
    """Return layer -> the largest magnitude of each dimension of its hidden states, float32 [hidden size]."""
    found: dict[str, torch.Tensor] = {}
    for entry in report.inputs:
        if entry.is_hidden_state:
            largest = report.largest[entry.module_name]
            found[entry.layer] = torch.maximum(found.get(entry.layer, largest), largest)
    return found


def _new_figure(title: str, height: float, width: float = _WIDTH) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_map(report: OutlierReport, states: dict[str, torch.Tensor], inches: float = _WIDTH) -> Figure:
    """Layers x dimensions: the largest magnitude, on a logarithmic scale, features labelled on top."""
    from matplotlib.colors import LogNorm

    values = torch.stack(list(states.values())).nan_to_num(posinf=3e38)
    width = values.shape[1]
    group = -(-width // _MAX_MAP_COLUMNS)
    padded = torch.nn.functional.pad(values, (0, -width % group))
    pooled = padded.view(len(values), -1, group).amax(2)
    figure, axes = _new_figure("", min(9.0, 3.0 + 0.14 * len(values)), inches)
    lowest = max(float(pooled.median()) / 2, 1e-3)
    image = axes.imshow(
        pooled.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis",
        norm=LogNorm(lowest, max(float(pooled.max()), 2 * lowest)),
        extent=(-0.5, pooled.shape[1] * group - 0.5, len(values) - 0.5, -0.5),
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_xlabel("dimension of the hidden state" + (f" (largest of each {group})" if group > 1 else ""))
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=axes, label="largest |x|", pad=0.01)
    _label_plainly(bar.ax.yaxis)
    figure.suptitle("Where the outliers are: largest magnitude by layer and dimension", x=0.01, ha="left", fontsize=11)
    _label_features(axes, report, width, _WIDTH / inches)
    return figure


def _label_features(axes: Any, report: OutlierReport, width: int, crowding: float) -> None:
    """Draw ticks on top for the largest features; labels that would overlap are left out."""
    largest = sorted(report.features, key=lambda feature: -abs(feature.extreme))[:_MAX_LABELS]
    if not largest:
        return
    top = axes.secondary_xaxis("top")
    shown: list[int] = []
    for feature in largest:
        if all(abs(feature.column - other) > crowding * width * len(str(width)) / 100 for other in shown):
            shown.append(feature.column)
    columns = sorted(feature.column for feature in largest)
    top.set_xticks(columns, [f"{k}" if k in shown else "" for k in columns], fontsize=8)
    top.set_xlabel("outlier features", fontsize=9)


def draw_magnitudes(report: OutlierReport) -> Figure:
    """Draw the largest magnitude of each kind of input by layer; equal inputs are drawn once."""
    figure, axes = _new_figure("How large inputs are, by layer and projection", 4.2)
    layers = list(dict.fromkeys(layer_of(entry.module_name) for entry in report.inputs if entry.layer))
    lines: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for kind in dict.fromkeys(entry.projection for entry in report.inputs if entry.layer):
        points = [
            (layers.index(e.layer), min(e.extreme, 3e38)) for e in report.inputs if e.layer and e.projection == kind
        ]
        lines.setdefault(tuple(points), []).append(kind)
    for i, (line, kinds) in enumerate(lines.items()):
        axes.plot(*zip(*line, strict=True), label=", ".join(kinds), **_style(i, len(layers)))
    _finish(axes, report, len(layers))
    return figure


def draw_growth(report: OutlierReport, states: dict[str, torch.Tensor]) -> Figure:
    """Draw the largest magnitude of each feature by layer, against other dimensions."""
    figure, axes = _new_figure("How outlier features grow with depth", 4.2)
    values = torch.stack(list(states.values())).nan_to_num(posinf=3e38)
    others = torch.ones(values.shape[1], dtype=torch.bool)
    others[[feature.column for feature in report.features]] = False
    x = range(len(values))
    if others.any():
        median, high = values[:, others].quantile(torch.tensor([0.5, 1.0]), dim=1)
        axes.fill_between(x, median, high, color=GREY, alpha=0.3, linewidth=0, label="other dimensions, upper half")
    largest = sorted(report.features, key=lambda feature: -abs(feature.extreme))[: len(COLOURS)]
    for i, feature in enumerate(largest):
        axes.plot(x, values[:, feature.column], label=f"dimension {feature.column}", **_style(i, len(values)))
    _finish(axes, report, len(values))
    return figure


def _label_plainly(axis: Any) -> None:
    """Label a logarithmic axis with 20 and 50 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _style(i: int, n_points: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5,
        "markevery": max(1, n_points // 16),
        "linewidth": 1.6,
    }


def _finish(axes: Any, report: OutlierReport, n_layers: int) -> None:
    axes.axhline(report.threshold, color=GREY, linestyle="--", linewidth=1, label=f"threshold {report.threshold:g}")
    axes.set_yscale("log")
    _label_plainly(axes.yaxis)
    axes.set_xlabel("layer")
    axes.set_ylabel("largest |x|")
    axes.set_xlim(-0.3, n_layers - 0.7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
