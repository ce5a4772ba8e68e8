"""Prints the outcome of `int8convert verify`: the verdict, the failures, then tables."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from int8convert.cli.console import note, print_line, print_table
from int8convert.publish.verify_command import deciding_run
from int8convert.publish.verify_json import Status, Verdict
from int8convert.text import counted, format_bytes, format_percent, format_seconds
from int8convert.verification.verify_report import cause_lines, cause_rows, fidelity_rows

if TYPE_CHECKING:
    from int8convert.verification.exact.level import ExactReport
    from int8convert.verification.fidelity.level import FidelityReport
    from int8convert.verification.tasks import TaskReport
    from int8convert.verification.verify_report import TextUsed, VerifyReport


_VERDICTS = {
    Verdict.PASSED: ("passed", "bold green"),
    Verdict.FAILED: ("failed", "bold red"),
    Verdict.UNDECIDED: ("too few tokens to say", "bold yellow"),
}
"""Verdict -> its words and style."""


def print_report(report: VerifyReport) -> None:
    """Print the report, failures first."""
    verdict, style = _VERDICTS[report.verdict]
    print_line(f": {verdict}", head=f"{report.out}{_at(report.exact.commit)}", style=style)
    for line in (*report.failures, *(each.line for each in report.undecided)):
        print_line(f"  {line}")
    if report.verdict is Verdict.UNDECIDED and report.text is not None:
        _print_deciding_run(report, report.text)
    for earlier in report.earlier_failures:
        if earlier.status is Status.STANDS:
            note(f"this run does not clear that failure; passing this command does: {earlier.command(report.out)}")
        elif earlier.status is Status.OVERRULED:
            note(f"passed with looser gates than an earlier failed run; the model card says so: {earlier.failures[0]}")
    for text in report.exact.notes:
        note(text)
    _print_exact(report.exact)
    if report.text is not None:
        print_line(f": {_measured_on(report.text, report.fidelity)}", head="Fidelity")
        _print_fidelity(report.fidelity)
        _print_causes(report)
        _print_sweep(report.sweep)
        _print_tasks(report.tasks)
    elif report.level != "exact":
        note("the models were not run: the exact level failed")
    if report.level == "tasks" and report.fidelity and not report.tasks:
        note("the tasks were not run: the fidelity level did not pass")


def _print_deciding_run(report: VerifyReport, text: TextUsed) -> None:
    run = deciding_run(report.undecided, asdict(text))
    note(f"to decide, run the same command with {shlex.join(run.options())}")
    if run.needs_longer_text:
        note(f"this text has {counted(text.n_text_tokens, 'token')}, too few for these windows")


def _at(commit: str | None) -> str:
    """Return " at COMMIT" for a repository on the Hub, "" for a directory."""
    return f" at {commit[:12]}" if commit is not None else ""


def _print_exact(exact: ExactReport) -> None:
    source = f" of {exact.reference!s}{_at(exact.reference_commit)}" if exact.reference_commit else ""
    print_line(
        f": {counted(exact.n_int8_weights, 'int8 weight')}{source}, {format_bytes(exact.n_read_bytes)} in "
        f"{format_seconds(exact.elapsed_s)}",
        head="Exact",
    )
    if exact.compared:
        print_line(f"compared with {exact.reference}{_at(exact.reference_commit)}: {exact.compared}")
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
            f"{counted(exact.n_different_codes, 'code')} and {counted(exact.n_different_scales, 'scale')} differ from "
            "the reference rounding"
        )


def _measured_on(text: TextUsed, reports: tuple[FidelityReport, ...]) -> str:
    cut = text.convention.partition(":")[0]
    scored = f"; {counted(reports[0].n_tokens, 'token')} scored" if reports else ""
    return (
        f"{text.description} ({counted(text.n_text_tokens, 'token')}), {counted(text.n_sequences, 'window')} of "
        f"{text.length:,}, {cut}{scored}"
    )


def _print_fidelity(reports: tuple[FidelityReport, ...]) -> None:
    print_table(
        "",
        ("", *(report.mode for report in reports)),
        [(label, *values) for label, values in fidelity_rows(reports)],
    )


def _print_causes(report: VerifyReport) -> None:
    if report.causes is None:
        return
    print_table(
        f"Estimated causes, {report.causes.mode}: KL divergence by what is rounded ({report.causes.n_tokens:,} tokens)",
        ("kind", "modules", "weights", "inputs", "share"),
        cause_rows(report.causes),
    )
    for line in cause_lines(report):
        print_line(line)


def _print_sweep(reports: tuple[FidelityReport, ...]) -> None:
    if not reports:
        return
    print_table(
        "Outlier thresholds",
        ("threshold", "mode", "columns in 16 bits", "perplexity", "delta-NLL", "KL, mean", "same top token"),
        [
            (
                *("none" if r.threshold is None else f"{r.threshold:g}", r.mode, format_percent(r.outlier_share)),
                *(f"{r.perplexity:,.6g}", f"{r.delta_nll:+.6f}", f"{r.mean_kl:.6f}", format_percent(r.same_top1)),
            )
            for r in reports
        ],
    )


def _print_tasks(reports: tuple[TaskReport, ...]) -> None:
    if not reports:
        return
    print_table(
        "Zero-shot tasks",
        ("task", "metric", "questions", "source", "int8", "only source right", "only int8 right", "p"),
        [
            (
                *(r.task, r.metric, f"{r.n_samples:,}", f"{r.reference:.6g}", f"{r.int8:.6g}"),
                *("" if n is None else f"{n:,}" for n in (r.n_only_reference, r.n_only_int8)),
                "" if r.p_value is None else f"{r.p_value:.2g}",
            )
            for r in reports
        ],
    )
