"""`int8convert verify`: whether an int8 checkpoint is what it should be, and does what its source does."""

from __future__ import annotations

import io
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli.console import (
    note,
    print_json,
    quieting_hub,
    quieting_libraries,
    reporting_errors,
)
from int8convert.cli.options import (
    AsJson,
    UsageError,
    check_choice,
    check_device,
    check_named,
    check_remote,
    given_options,
)
from int8convert.runtime.text.texts import DATASETS, Convention, Text, reusable_file
from int8convert.verification.options import Level

if TYPE_CHECKING:
    from int8convert.verification.verify_report import VerifyReport

HELP = """Compare an int8 checkpoint with what it was made of, and say whether it passes.

First every tensor, exactly and with no model run; then both models on the same tokens: difference in log-likelihood,
KL divergence, agreement. What is found is also written into OUT, as int8convert/verify.json, unless OUT is on the Hub.

\b
Examples:
  int8convert verify ./opt-6.7b-int8 --level exact
  int8convert verify ./opt-6.7b-int8 --text sample.txt --max-kl 0.005 --json
  int8convert verify me/opt-6.7b-int8 --level exact

Exit codes: 0 passed; 1 could not be measured; 2 wrong usage; 3 measured, and failed; 130 interrupted, 143 terminated.
"""

FAILED = 3

_INTERRUPTED = "nothing was written; a verify.json that was there is still there"
_OF_TASKS = ("tasks", "tasks_path", "task_limit", "min_task_p")
_OF_MODELS = ("text", "dataset", "max_dnll", "max_kl", "sequences", "length", "convention", "thresholds", "stream")
"""Options of the levels "tasks", and "fidelity" and above."""


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
    context: typer.Context,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", callback=check_named, help="The int8 checkpoint: a directory, or ORG/NAME on the Hub."
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of OUT on the Hub; default: main.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SRC", help="What it was made of; default: what its manifest names.")
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="exact: tensors alone; fidelity: and then both models on a text; tasks: and then on zero-shot tasks, "
            "which needs int8convert[eval].",
        ),
    ] = "fidelity",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to run both models on, in UTF-8; default: a small one.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="wikitext2 or c4, from the Hugging Face Hub or its cache.")
    ] = None,
    max_dnll: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="X", help="Gate: upper 95 % bound of the difference in log-likelihood, nats a token."
        ),
    ] = 0.01,
    max_kl: Annotated[float, typer.Option(min=0.0, metavar="X", help="Gate: mean KL divergence, nats a token.")] = 0.01,
    sequences: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text to run.")] = 16,
    length: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of each; default: 2048, or what the model takes.")
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the text is cut: spread, contiguous, strided or halves; default: contiguous, as "
            "published figures are, for a dataset, else spread.",
        ),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="T,T,..", help="Outlier thresholds to compare, too, such as 0,3,inf.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Layer by layer, one of each model in memory; default: where needed.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,..", help="Tasks of lm-eval; default: winogrande, hellaswag, piqa and lambada_openai."
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tasks of your own, in lm-eval's YAML; may run code in them.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Questions of each task.")] = None,
    min_task_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, metavar="P", help="Gate: a worse task score fails if McNemar's p is below this."
        ),
    ] = 0.001,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            callback=check_device,
            envvar="INT8CONVERT_DEVICE",
            help="Where the models run: auto, cpu or cuda[:n].",
        ),
    ] = "auto",
    lora: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="The adapter that was merged when OUT was made; --level exact only."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SRC's own code to find its weights, as for quantize.")
    ] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write a page with pictures, in HTML.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the pictures, as PNG and SVG.")
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, and no notes but those on the verdict.")
    ] = False,
) -> None:
    check_choice(level, tuple(Level), "--level")
    _check_effect(context, level)
    if revision is not None:
        check_remote("--revision", out, "checkpoints")
    check_choice(dataset, DATASETS, "--dataset")
    check_choice(convention, tuple(Convention), "--convention")
    swept = _numbers(thresholds)
    if text is not None and dataset is not None:
        raise typer.BadParameter("give one of --text and --dataset", param_hint="--dataset")
    with (
        reporting_errors(as_json, _INTERRUPTED),
        quieting_hub(),
        reusable_file(None if level == "exact" else text) as reusable,
    ):
        from int8convert.cli.progress import showing_progress
        from int8convert.publish.verify_json import Gates
        from int8convert.verification.earlier_runs import kept_parts, write_report
        from int8convert.verification.options import Execution, Tasks
        from int8convert.verification.verify import verify as run

        is_drawn = report_file is not None or figures is not None
        libraries = quieting_libraries(False) if is_drawn or level != "exact" else nullcontext()  # it loads them
        # The harness of the tasks has bars that nothing else turns off; errors are printed further out.
        is_silent = level == "tasks" and (quiet or as_json)
        bars = redirect_stderr(io.StringIO()) if is_silent else nullcontext()
        with showing_progress(quiet, as_json) as on_event, libraries, bars:
            if is_drawn:
                from int8convert.verification.page import prepare

                prepare(report_file, figures)
            report = run(
                out,
                revision=revision,
                reference=reference,
                level=level,
                text=Text(reusable, dataset, sequences, length, convention),
                tasks=Tasks(tuple(tasks.split(",")) if tasks else (), tasks_path, task_limit),
                gates=Gates(max_dnll, max_kl, min_task_p),
                execution=Execution(device, stream or None, thresholds=swept),
                lora=lora,
                trust_remote_code=trust_remote_code,
                on_event=on_event,
            )
        written = None
        kept = ", ".join(kept_parts(report).get("kept", ()))
        try:
            there = write_report(report)
            written = str(there) if there is not None else None
            if there is None and not quiet and not as_json:
                note(f"no verify.json was written: {out} is on the Hub, and stays as it is")
        except OSError as error:
            note(f"the report could not be written into '{out}': {error.strerror}")
        if is_drawn:
            with quieting_libraries(False):
                _write_pages(report, report_file, figures, reusable, dataset, device)
        if as_json:
            print_json({**report.to_json(), "written": written})
        else:
            from int8convert.cli.verify_summary import print_report

            print_report(report)
            if kept and written and not quiet:
                note(f"kept in verify.json of an earlier run on the same files: {kept}")
            for path in (written, report_file, figures):
                if path is not None and not quiet:
                    note(f"written: {path}")
        if not report.is_passed:
            raise typer.Exit(FAILED)


def _check_effect(context: typer.Context, level: str) -> None:
    """Refuse options that a lower level than theirs does nothing with."""
    for name in given_options(context):
        option = f"--{name.replace('_', '-')}"
        if name in _OF_TASKS and level != "tasks":
            raise UsageError(f"{option} has no effect at --level {level}: it needs --level tasks")
        if name in _OF_MODELS and level == "exact":
            raise UsageError(f"{option} has no effect at --level exact, which runs no model")


def _write_pages(
    report: VerifyReport, page: Path | None, folder: Path | None, text: Path | None, dataset: str | None, device: str
) -> None:
    """The page and its pictures; with the outliers on the same text, where the models fit in memory."""
    from int8convert.sources import open_source
    from int8convert.verification.page import draw_pictures, write_page, write_pictures

    outliers = None
    if report.fidelity and not report.fidelity[0].streamed:
        from int8convert.outliers.find import find_outliers

        directory = open_source(report.out, report.exact.commit).directory
        outliers = find_outliers(directory, Text(text, dataset, convention="spread"), device=device)
    pictures = draw_pictures(report, outliers)
    if page is not None:
        write_page(report, pictures, page)
    if folder is not None:
        write_pictures(pictures, folder)
