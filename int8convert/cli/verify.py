"""`int8convert verify`: whether an int8 checkpoint is what it should be, and does what its source does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from int8convert.cli.console import (
    format_bytes,
    format_percent,
    format_seconds,
    note,
    print_json,
    print_line,
    print_table,
    reporting_errors,
    stderr,
    wants_live_display,
)

if TYPE_CHECKING:
    from int8convert.evaluation.exact import ExactReport
    from int8convert.evaluation.fidelity import FidelityProgress, FidelityReport
    from int8convert.evaluation.verify_report import VerifyReport

HELP = """Compare an int8 checkpoint with what it was made of, and say whether it passes.

First every tensor, exactly and with no model run; then both models on the same tokens: difference in log-likelihood,
KL divergence, agreement. What is found is also written into OUT, as int8convert/verify.json.

\b
Examples:
  int8convert verify ./opt-6.7b-int8 --level exact
  int8convert verify ./opt-6.7b-int8 --text sample.txt --max-kl 0.005 --json

Exit codes: 0 passed; 1 could not be measured; 2 wrong usage; 3 measured, and failed; 130 interrupted, 143 terminated.
"""

FAILED = 3

_INTERRUPTED = "nothing was written; a verify.json that was there is still there"
_LEVELS = ("exact", "fidelity")
_DATASETS = ("wikitext2", "c4")
_CONVENTIONS = ("spread", "contiguous", "strided", "halves")


def _choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}", param_hint=name)


def _numbers(value: str | None) -> tuple[float, ...]:
    """Thresholds between commas."""
    try:
        found = tuple(float(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        found = (-1.0,)
    if not all(threshold >= 0 for threshold in found):
        raise typer.BadParameter(f"{value!r} is no list of thresholds, such as 0,3,6,inf", param_hint="--thresholds")
    return found


def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The int8 checkpoint.")],
    reference: Annotated[
        str | None, typer.Option(metavar="SRC", help="What it was made of; default: what its manifest names.")
    ] = None,
    level: Annotated[str, typer.Option(help="exact: tensors alone; fidelity: and then both models.")] = "fidelity",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to run both models on, in UTF-8; default: a small one.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="wikitext2 or c4, from the Hugging Face Hub or its cache.")
    ] = None,
    max_dnll: Annotated[
        float, typer.Option(min=0.0, help="Gate: upper 95 % bound of the difference in log-likelihood, nats a token.")
    ] = 0.01,
    max_kl: Annotated[float, typer.Option(min=0.0, help="Gate: mean KL divergence, nats a token.")] = 0.01,
    sequences: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text to run.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of each; default: 2048, or what the model takes.")
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            help="How the text is cut: spread, contiguous, strided or halves; default: contiguous, as "
            "published figures are, for a dataset, else spread."
        ),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="T,T,..", help="Outlier thresholds to compare, too, such as 0,3,inf.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Layer by layer, one of each model in memory; default: where needed.")
    ] = False,
    device: Annotated[
        str, typer.Option(envvar="INT8CONVERT_DEVICE", help="Where the models run: auto, cpu or cuda[:n].")
    ] = "auto",
    lora: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="The adapter that was merged when OUT was made; --level exact only."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SRC's own code to find its weights, as for quantize.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.")] = False,
) -> None:
    _choice("--level", level, _LEVELS)
    _choice("--dataset", dataset, _DATASETS)
    _choice("--convention", convention, _CONVENTIONS)
    swept = _numbers(thresholds)
    if text is not None and dataset is not None:
        raise typer.BadParameter("give one of --text and --dataset", param_hint="--dataset")
    with reporting_errors(as_json, _INTERRUPTED):
        from int8convert.evaluation.verify import verify as run
        from int8convert.evaluation.verify import write_report

        with _showing_bytes(quiet, as_json) as on_exact:
            report = run(
                out,
                reference=reference,
                text=text,
                dataset=dataset,
                level=level,
                thresholds=swept,
                max_dnll=max_dnll,
                max_kl=max_kl,
                n_sequences=sequences,
                length=length,
                convention=convention,
                stream=stream or None,
                device=device,
                lora=lora,
                trust_remote_code=trust_remote_code,
                on_exact=on_exact,
                on_fidelity=None if quiet or as_json else _say_steps(),
            )
        written = None
        try:
            written = str(write_report(report))
        except OSError as error:
            note(f"the report could not be written into '{out}': {error.strerror}")
        if as_json:
            print_json({**report.to_json(), "written": written})
        else:
            _print_report(report)
            if written is not None and not quiet:
                note(f"written: {written}")
        if not report.is_passed:
            raise typer.Exit(FAILED)


@contextmanager
def _showing_bytes(quiet: bool, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the bytes compared, where a person watches."""
    if not wants_live_display(quiet, as_json):
        yield None
        return
    progress = Progress(
        TextColumn("comparing tensors"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(compact=True),
        console=stderr,
        transient=True,
    )
    task = progress.add_task("", total=None)
    with progress:
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _say_steps() -> Callable[[FidelityProgress], None]:
    """What a measurement is going to take, before it takes it; then a line now and then."""
    last = [0]

    def on_progress(progress: FidelityProgress) -> None:
        if progress.step == "start":
            how = "layer by layer" if progress.streamed else "both models in memory"
            note(f"running {how}, at most {format_bytes(progress.peak_memory_bytes)}")
            return
        tenth = 10 * progress.n_done // max(1, progress.n_steps)
        if tenth > last[0]:
            last[0] = tenth
            stderr.print(f"fidelity: {progress.n_done:,} of {progress.n_steps:,} steps")

    return on_progress


def _print_report(report: VerifyReport) -> None:
    """What failed comes first."""
    verdict = "[bold green]passed[/]" if report.is_passed else "[bold red]failed[/]"
    print_line(f"[bold]{escape(report.out)}[/]: {verdict}")
    for failure in report.failures:
        print_line(f"  {escape(failure)}")
    for text in report.exact.notes:
        note(text)
    _print_exact(report.exact)
    if report.text is not None:
        print_line(f"[bold]Fidelity[/]: {escape(report.text.description)}; {escape(report.text.convention)}")
        _print_fidelity(report.fidelity)
        _print_sweep(report.sweep)
    elif report.level != "exact":
        note("the models were not run: the exact level failed")


def _print_exact(exact: ExactReport) -> None:
    print_line(
        f"[bold]Exact[/]: {exact.n_int8_weights:,} int8 weights, {format_bytes(exact.n_read_bytes)} in "
        f"{format_seconds(exact.elapsed_s)}"
    )
    print_table(
        "",
        ("check", "looked at", "found", ""),
        [
            (check.name, f"{check.n_checked:,}", f"{check.n_findings:,}", "ok" if check.is_passed else "FAILED")
            for check in exact.checks
        ],
    )
    if exact.n_different_codes or exact.n_different_scales:
        print_line(
            f"{exact.n_different_codes:,} codes and {exact.n_different_scales:,} scales differ from the reference "
            "rounding"
        )


def _print_fidelity(reports: tuple[FidelityReport, ...]) -> None:
    rows: list[tuple[str, Callable[[FidelityReport], str]]] = [
        ("outlier threshold", lambda r: "none" if r.threshold is None else f"{r.threshold:g}"),
        ("columns in 16 bits", lambda r: format_percent(r.outlier_share)),
        ("perplexity, source", lambda r: f"{r.reference_perplexity:.4f}"),
        ("perplexity, int8", lambda r: f"{r.perplexity:.4f}"),
        ("delta-NLL", lambda r: f"{r.delta_nll:+.6f}"),
        ("  95 % interval", lambda r: f"{r.delta_nll_interval[0]:+.6f} to {r.delta_nll_interval[1]:+.6f}"),
        ("KL, mean", lambda r: f"{r.mean_kl:.6f}"),
        ("  95 % interval", lambda r: f"{r.mean_kl_interval[0]:.6f} to {r.mean_kl_interval[1]:.6f}"),
        ("KL, median", lambda r: f"{r.median_kl:.6f}"),
        ("KL, 99 %", lambda r: f"{r.p99_kl:.6f}"),
        ("KL, 99.9 %", lambda r: f"{r.p999_kl:.6f}"),
        ("same top token", lambda r: format_percent(r.same_top1)),
        ("delta-p, rms", lambda r: format_percent(r.delta_p)),
        ("streamed", lambda r: "yes" if r.streamed else "no"),
        ("peak memory", lambda r: format_bytes(r.peak_memory_bytes)),
        ("time", lambda r: format_seconds(r.seconds)),
    ]
    print_table(
        "",
        ("", *(report.mode for report in reports)),
        [(name, *(value(report) for report in reports)) for name, value in rows],
    )


def _print_sweep(reports: tuple[FidelityReport, ...]) -> None:
    """One line for each threshold."""
    if not reports:
        return
    print_table(
        "Outlier thresholds",
        ("threshold", "mode", "columns in 16 bits", "perplexity", "delta-NLL", "KL, mean", "same top token"),
        [
            (
                *("none" if r.threshold is None else f"{r.threshold:g}", r.mode, format_percent(r.outlier_share)),
                *(f"{r.perplexity:.4f}", f"{r.delta_nll:+.6f}", f"{r.mean_kl:.6f}", format_percent(r.same_top1)),
            )
            for r in reports
        ],
    )
