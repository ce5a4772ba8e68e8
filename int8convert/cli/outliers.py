"""`int8convert outliers`: find outlier features, and store the columns worth keeping in 16 bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8convert.cli.console import (
    note,
    print_json,
    print_line,
    print_table,
    quieting_libraries,
    reporting_errors,
    wants_live_display,
)
from int8convert.cli.options import AsJson, check_device, check_named
from int8convert.cli.static_set import print_stored, store
from int8convert.errors import SourceError
from int8convert.text import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from int8convert.outliers.find import OutlierReport

HELP = """Find a model's outlier feature dimensions by running a text through it, and store their columns in 16 bits.

CHECKPOINT is a directory, converted or not; it has to fit into memory. With --write OUT the columns that matter most
are taken from the source and stored beside the int8 weights in OUT, where int8convert.load finds them.

\b
Examples:
  int8convert outliers opt-6.7b --text sample.txt --ablate --figures figures
  int8convert outliers opt-6.7b-int8 --text sample.txt --write opt-6.7b-int8
  int8convert outliers opt-6.7b-int8 --text sample.txt --json > outliers.json

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""

_INTERRUPTED = "nothing was written; a static set that was there is still there"


def outliers(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", callback=check_named, help="The checkpoint to run.")
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to run through it, in UTF-8.")],
    write: Annotated[
        str | None, typer.Option("--write", metavar="OUT", help="Store the columns in this int8 checkpoint.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="What OUT was made of; default: CHECKPOINT, or what OUT's manifest names."),
    ] = None,
    lora: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="The adapter that was merged when OUT was made.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="X", envvar="INT8CONVERT_THRESHOLD", help="Magnitude from which a value is an outlier."
        ),
    ] = 6.0,
    sequences: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text to run.")] = 16,
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of each; default: 256, or what the model takes if that is less."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(min=0.0, metavar="PERCENT", help="Room for more than the frequent outliers, of the int8 bytes."),
    ] = 1.0,
    ablate: Annotated[bool, typer.Option("--ablate", help="Measure what taking the features away does.")] = False,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNG and SVG files there; needs int8convert[report].")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            callback=check_device, metavar="DEVICE", envvar="INT8CONVERT_DEVICE", help="auto, cpu or cuda[:n]."
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with CHECKPOINT or SRC.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes.")] = False,
) -> None:
    if threshold == 0:
        raise typer.BadParameter("it must be above 0", param_hint="--threshold")
    if write is None and (source is not None or lora is not None):
        raise typer.BadParameter("it is for --write OUT", param_hint="--source" if source else "--lora")
    is_live = wants_live_display(quiet, as_json)
    with reporting_errors(as_json, _INTERRUPTED), quieting_libraries(is_live):
        taken_from = _find_source(checkpoint, write, source) if write is not None else ""
        if figures is not None:
            from int8convert.outliers.figures import prepare_folder

            prepare_folder(figures)
        from int8convert.outliers.find import find_outliers
        from int8convert.outliers.store import int8_modules
        from int8convert.runtime.text.texts import Text

        report = find_outliers(
            checkpoint,
            Text(text, n_sequences=sequences, length=length),
            threshold=threshold,
            with_ablation=ablate,
            budget=budget / 100,
            module_names=int8_modules(write) if write is not None else None,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        stored = None
        if write is not None:
            stored = store(report, taken_from, write, lora, trust_remote_code)
        drawn = _draw(report, figures) if figures is not None else []
        if as_json:
            print_json({**report.to_json(), "written": stored and asdict(stored), "figures": drawn})
            return
        _print_report(report)
        if stored is not None:
            print_stored(stored)
        elif not quiet:
            n = sum(map(len, report.static_set.values()))
            note(f"--write OUT would store {n:,} columns: {format_bytes(report.static_set_bytes)}, {_share(report)}")


def _find_source(checkpoint: str, out: str, source: str | None) -> str:
    """Where the 16-bit weights are."""
    from int8convert.checkpoint.manifest import Manifest
    from int8convert.runtime.models import is_int8
    from int8convert.sources import open_source

    if source is not None or not is_int8(checkpoint):
        return open_source(source or checkpoint).label
    named = Manifest(Path(out)).read_source()
    if named is None:
        found = "none"
    elif not Path(named).is_dir():
        found = f"'{named}', which is not there"
    elif is_int8(named):
        found = f"'{named}', which is int8 itself"
    else:
        return named
    raise SourceError(
        f"the 16-bit columns come from what '{out}' was made of, and its manifest names {found}",
        "name that checkpoint with --source SRC",
    )


def _draw(report: OutlierReport, folder: Path) -> list[str]:
    from int8convert.outliers.figures import draw_figures

    return [str(path) for path in draw_figures(report, folder)]


def _share(report: OutlierReport) -> str:
    return f"{format_percent(report.static_set_bytes / max(1, report.int8_bytes))} of the int8 weights"


def _print_report(report: OutlierReport) -> None:
    print_line(
        f": {len(report.inputs)} inputs, {report.n_sequences} x {report.length} tokens "
        f"of {report.text}, {format_seconds(report.elapsed_s)} on {report.device}",
        head=report.path,
    )
    _print_features(report)
    _print_projections(report)
    if report.ablation:
        print_table(
            "Ablation: features of the hidden state set to zero",
            ("set to zero", "features", "top-1 probability", "perplexity"),
            [
                (r.name, f"{len(r.columns)}", format_percent(r.top1_probability), f"{r.perplexity:,.2f}")
                for r in report.ablation
            ],
        )


def _print_features(report: OutlierReport) -> None:
    if not report.features:
        print_line(
            f"no outlier features: no dimension reaches {report.threshold:g} in 25 % of the {report.n_layers} layers "
            "and at 6 % of the positions"
        )
        return
    print_table(
        f"Outlier features: |x| >= {report.threshold:g} in 25 % of {report.n_layers} layers, at 6 % of the positions",
        ("dimension", "layers", "positions", "extreme", "quartiles", "sides"),
        [
            (
                *(f"{f.column}", format_percent(f.layer_share), format_percent(f.position_share)),
                *(f"{f.extreme:.4g}", ", ".join(f"{q:.3g}" for q in f.quartiles or ()), f.sides),
            )
            for f in report.features
        ],
    )


def _print_projections(report: OutlierReport) -> None:
    """One row for each projection, over all layers."""
    kinds: dict[str, list[Any]] = {}
    for entry in report.inputs:
        kinds.setdefault(entry.projection, []).append(entry)
    print_table(
        f"Columns of the inputs that reach {report.threshold:g} at any token, and those worth storing",
        ("projection", "layers", "width", "mean", "most", "largest |x|", "stored"),
        [
            (
                *(kind, f"{len(entries)}", f"{entries[0].n_features:,}"),
                f"{sum(len(entry.columns) for entry in entries) / len(entries):.1f}",
                f"{max(len(entry.columns) for entry in entries):,}",
                f"{max(entry.extreme for entry in entries):.4g}",
                f"{sum(len(report.static_set.get(entry.module_name, ())) for entry in entries):,}",
            )
            for kind, entries in kinds.items()
        ],
    )
