"""Prints the report of a finished conversion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from int8convert.cli.console import note, print_line, print_table
from int8convert.cli.dry_run import print_kept
from int8convert.text import counted, format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from int8convert.conversion.report import ConversionReport
    from int8convert.events import GroupsSmoothed


def print_report(report: ConversionReport, place: str | None) -> None:
    print_line(
        f": {format_percent(report.coverage)} of the parameters and {format_percent(report.byte_coverage)} of the "
        "bytes are int8",
        head=place or "",
    )
    rate = f"{format_bytes(report.n_read_now_bytes / report.elapsed_s)}/s"
    run = f", {format_seconds(report.elapsed_s)} on {report.device}, {rate}"
    if report.n_done_shards:
        now = f"{format_bytes(report.n_read_now_bytes)} were read now{run}" if report.n_read_now_bytes else ""
        run = f"; {report.n_done_shards} of {report.n_shards} were done already, {now or 'nothing was read'}"
    print_line(
        f"{format_bytes(report.n_read_bytes)} -> {format_bytes(report.n_written_bytes)} "
        f"({format_percent(report.n_written_bytes / max(1, report.n_read_bytes))}) "
        f"in {counted(report.n_shards, 'shard')}{run}"
    )
    print_table(
        "Weight error (signal to quantization noise, higher is better)",
        ("layer kind", "tensors", "mean dB", "worst dB", "worst tensor"),
        [
            (e.layer_kind, f"{e.n_tensors}", _decibels(e.mean_sqnr_db), _decibels(e.worst_sqnr_db), e.worst_tensor)
            for e in report.errors
        ],
    )
    if report.rounding is not None:
        found = report.rounding
        change = f"{found.error / found.nearest_error:.2f}" if found.nearest_error else "1"
        print_line(
            f"calibrated rounding: {format_percent(found.n_accepted_rows / max(1, found.n_rows))} of "
            f"{counted(found.n_rows, 'row')} accepted; squared error of the outputs on held-out inputs: {change} of "
            "that of rounding to nearest"
        )
    if report.smoothed is not None:
        print_line(_smoothed_line(report.smoothed))
    print_kept([(kept.reason, kept.n_tensors, kept.n_parameters) for kept in report.kept], report.n_parameters)
    if report.kept_by_budget is not None and report.kept_by_budget.names:
        print_line(f": {', '.join(report.kept_by_budget.names)}", head="Kept in 16 bits by the budget")
    for name, n in report.non_finite.items():
        note(f"'{name}' was kept and holds {counted(n, 'NaN or infinite value')}")
    if report.zero_rows:
        name, n = next(iter(report.zero_rows.items()))
        more = (
            f", and many in {counted(len(report.zero_rows) - 1, 'other tensor')}" if len(report.zero_rows) > 1 else ""
        )
        note(
            f"{counted(n, 'row')} of '{name}' {'holds' if n == 1 else 'hold'} nothing but zeros{more}: "
            "the source may be half written"
        )


def _smoothed_line(found: GroupsSmoothed) -> str:
    if found.error_before is None or found.error_after is None:
        return f"smoothing: {counted(found.n_smoothed, 'group')} of layers, by factors that were chosen before"
    return (
        f"smoothing: {found.n_smoothed:,} of {counted(found.n_groups or 0, 'group')} of layers; their outputs' squared "
        f"error on held-out inputs falls from {found.error_before:.2g} to {found.error_after:.2g} of their squares"
    )


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"
