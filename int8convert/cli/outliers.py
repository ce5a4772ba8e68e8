"""`int8convert outliers`: finds outlier features, and stores their columns in 16 bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8convert.cli import console, options
from int8convert.cli.static_set import print_stored, store
from int8convert.errors import SourceError
from int8convert.text import format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from int8convert.outliers.damage import LayerDamage
    from int8convert.outliers.find import OutlierReport

HELP = f"""Find a model's outlier feature dimensions on a text, and store their columns in 16 bits.

CHECKPOINT is a directory or a repository on the Hub, converted or not. One layer of its model is in memory at a time;
--ablate and --damage need all of it there. With --write OUT, the most important columns are copied from the source and
stored beside the int8 weights of OUT. `int8convert.load` uses them.

\b
Examples:
  int8convert outliers opt-6.7b --text sample.txt --ablate --figures figures
  int8convert outliers opt-6.7b-int8 --text sample.txt --write opt-6.7b-int8
  int8convert outliers qwen3-8b --text sample.txt --damage --keep-budget 2
  int8convert outliers opt-6.7b-int8 --text sample.txt --json > outliers.json

{options.EXIT_CODES}
"""

_INTERRUPTED = "nothing was written; earlier stored columns are still there"


def outliers(
    context: typer.Context,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", callback=options.check_named, help="The checkpoint to run.")
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text in UTF-8 to run through the model.")],
    write: Annotated[
        str | None, typer.Option("--write", metavar="OUT", help="Store the columns in this int8 checkpoint.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="With --write: the source of OUT.  [default: CHECKPOINT, or what OUT's manifest names]",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="With --write: the adapter that was merged when OUT was made."),
    ] = None,
    threshold: options.OutlierThreshold = 6.0,
    sequences: options.Sequences = 16,
    length: options.WindowLength = None,
    budget: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="PERCENT",
            help="Bytes for further columns, in percent of the int8 bytes. Frequent outliers do not count.",
        ),
    ] = 1.0,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also run the model with its outlier features set to zero.")
    ] = False,
    damage: Annotated[
        bool,
        typer.Option(
            "--damage",
            help="Also estimate what rounding each layer costs, and choose layers and columns by it.",
        ),
    ] = False,
    keep_budget: Annotated[
        float,
        typer.Option(
            parser=options.parse_percent,
            metavar="PERCENT",
            help="With --damage: the most weights to keep in 16 bits, in percent.",
        ),
    ] = 5.0,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write figures as PNG and SVG. Needs int8convert[report].")
    ] = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes and no progress.")] = False,
) -> None:
    if threshold == 0:
        raise typer.BadParameter("it must be above 0", param_hint="--threshold")
    options.check_needs(context, {"source": "--write OUT", "lora": "--write OUT", "keep_budget": "--damage"})
    with console.reporting_errors(as_json, _INTERRUPTED), console.quieting_libraries(False, not quiet and not as_json):
        taken_from = _find_source(checkpoint, write, source) if write is not None else ""
        if figures is not None:
            from int8convert.outliers.figures import prepare_folder

            prepare_folder(figures)
        from int8convert.cli.progress import showing_progress
        from int8convert.outliers.find import find_outliers
        from int8convert.outliers.store import int8_modules
        from int8convert.runtime.text.texts import Text

        with showing_progress(quiet, as_json or quiet, "reading the model") as on_event:
            report = find_outliers(
                checkpoint,
                Text(text, n_sequences=sequences, length=length),
                threshold=threshold,
                with_ablation=ablate,
                with_damage=damage,
                budget=budget / 100,
                module_names=int8_modules(write) if write is not None else None,
                device=device,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        stored = None
        if write is not None:
            stored = store(report, taken_from, write, lora, trust_remote_code)
        drawn = _draw(report, figures) if figures is not None else []
        if as_json:
            kept = {"keep": [layer.module_name for layer in _kept(report, keep_budget)]} if damage else {}
            console.print_json({**report.to_json(), **kept, "written": stored and asdict(stored), "figures": drawn})
            return
        _print_report(report)
        if damage:
            _print_damage(report, keep_budget)
        if stored is not None:
            print_stored(stored)
        elif not quiet:
            n = sum(map(len, report.static_set.values()))
            share = format_percent(report.static_set_bytes / max(1, report.int8_bytes))
            size = f"{format_bytes(report.static_set_bytes)}, {share} of the int8 weights"
            console.note(f"--write OUT would store {n:,} columns: {size}")


def _find_source(checkpoint: str, out: str, source: str | None) -> str:
    """Return the checkpoint with the 16-bit weights."""
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
        f"the 16-bit columns come from the source of '{out}', and its manifest names {found}",
        "name the source with --source SRC",
    )


def _draw(report: OutlierReport, folder: Path) -> list[str]:
    from int8convert.outliers.figures import draw_figures

    return [str(path) for path in draw_figures(report, folder)]


def _print_report(report: OutlierReport) -> None:
    console.print_line(
        f": {len(report.inputs)} inputs, {report.n_sequences} x {report.length} tokens "
        f"of {report.text}, {format_seconds(report.elapsed_s)} on {report.device}",
        head=report.path,
    )
    _print_features(report)
    _print_projections(report)
    if report.ablation:
        console.print_table(
            "Ablation: features of the hidden state set to zero",
            ("set to zero", "features", "top-1 probability", "perplexity"),
            [
                (r.name, f"{len(r.columns)}", format_percent(r.top1_probability), f"{r.perplexity:,.2f}")
                for r in report.ablation
            ],
        )


def _print_features(report: OutlierReport) -> None:
    if not report.features:
        console.print_line(
            f"no outlier features: no dimension reaches {report.threshold:g} in 25 % of the {report.n_layers} layers "
            "and at 6 % of the positions"
        )
        return
    console.print_table(
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
    """Print one row for each projection, over all layers."""
    kinds: dict[str, list[Any]] = {}
    for entry in report.inputs:
        kinds.setdefault(entry.projection, []).append(entry)
    console.print_table(
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


def _kept(report: OutlierReport, budget_percent: float) -> tuple[LayerDamage, ...]:
    """Return the layers to keep in 16 bits, for the arithmetic that bitsandbytes and `load` have by default."""
    from int8convert.outliers.keep import choose_kept

    n_weights = sum(layer.n_weights for layer in report.damage)
    return choose_kept(report.damage, budget_percent / 100 * n_weights, "inputs_by_rule")


def _print_damage(report: OutlierReport, budget_percent: float) -> None:
    """Print what rounding costs by projection, and the layers to keep in 16 bits with the options that keep them."""
    from int8convert.outliers.damage import INPUTS

    kinds: dict[str, list[Any]] = {}
    for layer in report.damage:
        kinds.setdefault(layer.module_name.rpartition(".")[2], []).append(layer)
    console.print_table(
        "What rounding costs the predictions, estimated: KL divergence in nats a token",
        ("projection", "layers", "of weights", "of inputs: one scale a token", "LLM.int8()", "blocks of 128"),
        [
            (
                name,
                f"{len(layers)}",
                *(f"{sum(getattr(layer, cost) for layer in layers):.2g}" for cost in ("weights", *INPUTS)),
            )
            for name, layers in [*kinds.items(), ("all", list(report.damage))]
        ],
    )
    if left_out := len(report.inputs) - len(report.damage):
        console.print_line(
            f"not measured: {left_out:,} of {len(report.inputs):,} layers, which did not run on this text"
        )
    kept = _kept(report, budget_percent)
    if not kept:
        console.print_line(f"no layer fits into {format_percent(budget_percent / 100)} of the weights")
        return
    share = sum(layer.n_weights for layer in kept) / sum(layer.n_weights for layer in report.damage)
    before, taken = (sum(e.cost("inputs_by_rule") for e in layers) for layers in (report.damage, kept))
    console.print_line(
        f"keeping {format_percent(share)} of these weights in 16 bits would leave a KL divergence of about "
        f"{before - taken:.2g} of {before:.2g} by LLM.int8(): convert with "
        + " ".join(f"--skip {layer.module_name}" for layer in kept)
    )
