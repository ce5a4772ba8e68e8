"""`int8convert verify`: compares an int8 checkpoint with its source."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli import console, options
from int8convert.runtime.text.texts import DATASETS, Convention, Text, reusable_file
from int8convert.verification.options import Level

if TYPE_CHECKING:
    from int8convert.outliers.find import OutlierReport
    from int8convert.verification.verify_report import VerifyReport

HELP = """Check an int8 checkpoint against its source.

The level exact compares every tensor, and runs a few tokens through the model without its weights. The level fidelity
also runs both models on the same tokens. It measures the difference in log-likelihood, the KL divergence and the
agreement. The level tasks adds zero-shot tasks.

The outcome is written into OUT as int8convert/verify.json, unless OUT is on the Hub.

\b
Examples:
  int8convert verify ./opt-6.7b-int8 --level exact
  int8convert verify ./opt-6.7b-int8 --text sample.txt --max-kl 0.005 --json
  int8convert verify me/opt-6.7b-int8 --level exact

Exit codes: 0 passed; 1 could not be measured; 2 wrong usage; 3 measured, and failed; 4 measured on too few tokens to
say; 130 interrupted, 143 terminated.
"""

FAILED, UNDECIDED = 3, 4

_INTERRUPTED = "nothing was written; an earlier verify.json is still there"
_WAITING = "reading headers and the model class"
_OF_TASKS = ("tasks", "tasks_path", "task_limit", "min_task_p")
"""Options of the level tasks."""

_OF_MODELS = (
    *("text", "dataset", "sequences", "length", "convention", "thresholds"),
    *("max_dnll", "max_kl", "stream", "device", "figures"),
)
"""Options of the levels that run the models."""


def _numbers(value: str | None) -> tuple[float, ...]:
    """Return the thresholds between commas."""
    try:
        found = tuple(float(part) for part in value.split(",")) if value is not None else ()
    except ValueError:
        found = (-1.0,)
    if not all(threshold >= 0 for threshold in found):
        raise typer.BadParameter(f"{value!r} is no list of thresholds, such as 0,3,6,inf", param_hint="--thresholds")
    return found


def verify(
    context: typer.Context,
    out: options.Int8Checkpoint,
    revision: options.Revision = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SRC", help="The source of OUT.  [default: what OUT's manifest names]")
    ] = None,
    level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="exact (tensors), fidelity (also both models on a text), or tasks (also zero-shot tasks; needs "
            "int8convert[eval]).",
        ),
    ] = "fidelity",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text in UTF-8 for both models.  [default: a small one]")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Measure on wikitext2 or c4, from the Hub or its cache.")
    ] = None,
    max_dnll: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Gate for the 95 % interval of the difference in log-likelihood, in nats per token.",
        ),
    ] = 0.01,
    max_kl: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="X", help="Gate for the 95 % interval of the mean KL divergence, in nats per token."
        ),
    ] = 0.01,
    sequences: options.Sequences = 16,
    length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of each window.  [default: 2048, or what the model takes]"),
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to cut the text: spread, contiguous, strided or halves.  [default: contiguous for a dataset, "
            "else spread]",
        ),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="T,T,..", help="Also measure these outlier thresholds, e.g. 0,3,inf.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Hold one layer of each model in memory at a time.  [default: on if both models do not fit in memory]",
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,..", help="Tasks of lm-eval.  [default: winogrande,hellaswag,piqa,lambada_openai]"),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own tasks in lm-eval's YAML. Code in them may run."),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ask at most so many questions of each task.")
    ] = None,
    min_task_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, metavar="P", help="Gate: a worse task score fails if McNemar's p is below this."
        ),
    ] = 0.001,
    device: options.Device = "auto",
    lora: Annotated[
        str | None,
        typer.Option(metavar="ADAPTER", help="The adapter that was merged when OUT was made. Needs --level exact."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write an HTML page with figures.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the figures as PNG and SVG.")] = None,
    as_json: options.AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no progress, and no notes except those on the verdict.")
    ] = False,
) -> None:
    swept = _check_options(context, out, level)
    with (
        console.reporting_errors(as_json, _INTERRUPTED),
        console.quieting_hub(),
        reusable_file(None if level == "exact" else text) as reusable,
    ):
        from int8convert.cli.progress import showing_progress
        from int8convert.publish.verify_command import Gates
        from int8convert.verification.earlier_runs import kept_parts
        from int8convert.verification.options import Execution, Tasks
        from int8convert.verification.verify import verify as run

        pages = _Pages(report_file, figures, Text(reusable, dataset, convention="spread"), device)
        is_silent = quiet or as_json
        with _running_models(level, is_silent, pages.is_wanted), showing_progress(quiet, as_json, _WAITING) as on_event:
            pages.prepare()
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
        kept = kept_parts(report).get("kept", ())
        written = _write(report, is_silent)
        pages.write(report)
        if as_json:
            console.print_json({**report.to_json(), "written": written})
        else:
            _print_outcome(report, kept if written else (), (written, report_file, figures), quiet)
        if report.failures:
            raise typer.Exit(FAILED)
        if report.undecided:
            raise typer.Exit(UNDECIDED)


def _check_options(context: typer.Context, out: str, level: str) -> tuple[float, ...]:
    """Refuse options that are wrong, or that have no effect at this level; return the thresholds to measure."""
    given = context.params
    options.check_choice(level, tuple(Level), "--level")
    for name in options.given_options(context):
        if name in _OF_TASKS and level != "tasks":
            raise options.UsageError(
                f"{options.option_name(name)} has no effect at --level {level}: it needs --level tasks"
            )
        if name in _OF_MODELS and level == "exact":
            raise options.UsageError(f"{options.option_name(name)} has no effect at --level exact, which runs no model")
    if given["revision"] is not None:
        options.check_remote("--revision", out, "checkpoints")
    options.check_choice(given["dataset"], DATASETS, "--dataset")
    options.check_choice(given["convention"], tuple(Convention), "--convention")
    if given["text"] is not None and given["dataset"] is not None:
        raise typer.BadParameter("give one of --text and --dataset", param_hint="--dataset")
    return _numbers(given["thresholds"])


@contextmanager
def _running_models(level: str, is_silent: bool, is_drawn: bool) -> Iterator[None]:
    """Silence the libraries that a level loads."""
    # The harness of the tasks has bars that nothing else turns off; errors are printed further out.
    bars = redirect_stderr(io.StringIO()) if level == "tasks" and is_silent else nullcontext()
    runs = is_drawn or level != "exact"
    with console.quieting_libraries(False, not is_silent) if runs else nullcontext(), bars:
        yield


def _write(report: VerifyReport, is_silent: bool) -> str | None:
    """Write verify.json; return where, None if it was not written."""
    from int8convert.verification.earlier_runs import write_report

    try:
        there = write_report(report)
    except OSError as error:
        console.note(f"the report could not be written into '{report.out}': {error.strerror}")
        return None
    if there is None and not is_silent:
        console.note(f"no verify.json was written: {report.out} is on the Hub, and stays as it is")
    return str(there) if there is not None else None


def _print_outcome(
    report: VerifyReport, kept: Sequence[str], written: tuple[str | Path | None, ...], quiet: bool
) -> None:
    """Print a report, what verify.json keeps of an earlier one, and the files that were written."""
    from int8convert.cli.verify_summary import print_report

    print_report(report)
    if quiet:
        return
    if kept:
        console.note(f"kept in verify.json of an earlier run on the same files: {', '.join(kept)}")
    for path in filter(None, written):
        console.note(f"written: {path}")


@dataclass(frozen=True, slots=True)
class _Pages:
    """The page and the figures of a report, with the outliers of the same text where the models fit in memory."""

    page: Path | None
    folder: Path | None
    text: Text
    device: str

    @property
    def is_wanted(self) -> bool:
        return self.page is not None or self.folder is not None

    def prepare(self) -> None:
        """Check that they can be written, before hours of measuring."""
        if self.is_wanted:
            from int8convert.verification.page import prepare

            prepare(self.page, self.folder)

    def write(self, report: VerifyReport) -> None:
        if not self.is_wanted:
            return
        from int8convert.verification.page import draw_pictures, write_page, write_pictures

        with console.quieting_libraries(False):
            pictures = draw_pictures(report, self._outliers(report))
            if self.page is not None:
                write_page(report, pictures, self.page)
            if self.folder is not None:
                write_pictures(pictures, self.folder)

    def _outliers(self, report: VerifyReport) -> OutlierReport | None:
        if not report.fidelity or report.fidelity[0].streamed:
            return None
        from int8convert.outliers.find import find_outliers
        from int8convert.sources import open_source

        directory = open_source(report.out, report.exact.commit).directory
        return find_outliers(directory, self.text, device=self.device)
