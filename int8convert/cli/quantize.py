"""`int8convert quantize`: the main job on the command line."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8convert.cli.console import (
    format_bytes,
    format_count,
    format_gpus,
    format_percent,
    format_seconds,
    format_shards,
    note,
    print_json,
    print_line,
    print_table,
    quieting_libraries,
    reporting_errors,
    wants_live_display,
)
from int8convert.cli.static_set import calibrate_output, check_calibration, print_stored

if TYPE_CHECKING:
    from int8convert.conversion.report import ConversionReport

HELP = """Turn a checkpoint into an LLM.int8() checkpoint that transformers + bitsandbytes, or vLLM, load.

SRC is a directory with config.json and weights as safetensors or pytorch_model*.bin; it is only read. OUT gets int8
weights with their scales, everything else unchanged, and the small files that belong to a checkpoint. Interrupted,
killed or out of disk: the same command resumes behind the finished shards.

\b
Examples:
  int8convert quantize ./opt-66b ./opt-66b-int8
  int8convert quantize ./opt-66b --dry-run --skip 'layers.0.*'

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""


def check_size(size: str | None) -> str | None:
    from int8convert.conversion.quantize import parse_size

    try:
        parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return size


def check_device(device: str) -> str:
    from int8convert.conversion.device import check_device_name

    try:
        check_device_name(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return device


def _check_format(name: str) -> str:
    from int8convert.checkpoint.output_format import OutputFormat

    if name not in list(OutputFormat):
        raise typer.BadParameter(f"it is {' or '.join(OutputFormat)}, not {name!r}")
    return name


def _check_policy(policy: str) -> str:
    if policy not in ("error", "keep"):
        raise typer.BadParameter(f"it is error or keep, not {policy!r}")
    return policy


def quantize(
    src: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint directory to read.")],
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="The directory to write; not needed with --dry-run.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Leave these modules 16-bit, e.g. '*.fc2'; repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Turn no other modules into int8; repeatable."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(callback=_check_format, help="bitsandbytes, for transformers; or compressed-tensors, for vLLM."),
    ] = "bitsandbytes",
    threshold: Annotated[
        float,
        typer.Option(min=0.0, envvar="INT8CONVERT_THRESHOLD", help="Outlier threshold written for the loader."),
    ] = 6.0,
    min_coverage: Annotated[
        float,
        typer.Option(min=0.0, max=100.0, metavar="PERCENT", help="Fail if less of the parameters would become int8."),
    ] = 50.0,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", callback=check_size, help="Such as 5GB; default: one shard for each of SRC's."),
    ] = None,
    on_nonfinite: Annotated[
        str,
        typer.Option(callback=_check_policy, help="Weights no int8 can hold: error, or keep 16-bit."),
    ] = "error",
    lora: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Merge this PEFT adapter's directory into the weights.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Then run this text through OUT and store outlier columns in 16 bits."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SRC's own code if transformers has no class for the model.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, envvar="INT8CONVERT_WORKERS", help="Threads; default: one for each core.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            callback=check_device,
            envvar="INT8CONVERT_DEVICE",
            help="Where rows are quantized: cpu, cuda[:n], or auto, which is the CPU.",
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
    check: Annotated[bool, typer.Option("--check", help="When resuming, check finished shards by sha256.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    if out is None and not dry_run:
        raise typer.BadParameter("OUT is missing: name the directory to write, or pass --dry-run", param_hint="OUT")
    shared: dict[str, Any] = {
        "skip": skip or (),
        "only": only or (),
        "format": format,
        "max_shard_size": max_shard_size,
        "lora": lora,
        "trust_remote_code": trust_remote_code,
    }
    with reporting_errors(as_json):
        if dry_run:
            _dry_run(src, shared, min_coverage / 100, workers, device, as_json)
            return
        from int8convert.cli.progress import showing_progress
        from int8convert.conversion.quantize import quantize as run

        if calibrate is not None:
            with quieting_libraries(False):
                check_calibration(src, calibrate)
        with showing_progress(quiet, as_json) as on_event:
            report = run(
                src,
                out or "",
                **shared,
                threshold=threshold,
                min_coverage=min_coverage / 100,
                on_nonfinite=on_nonfinite,
                workers=workers,
                device=device,
                overwrite=overwrite,
                check=check,
                on_event=on_event,
            )
        stored = None
        if calibrate is not None:
            with quieting_libraries(wants_live_display(quiet, as_json)):
                stored = calibrate_output(src, out or "", calibrate, lora, trust_remote_code, device)
        if as_json:
            print_json({**report.to_json(), "outliers": stored and asdict(stored)})
            return
        _print_report(report)
        if stored is not None:
            print_stored(stored)


def _print_report(report: ConversionReport) -> None:
    print_line(
        f"[bold]{report.out}[/]: {format_percent(report.coverage)} of the parameters and "
        f"{format_percent(report.byte_coverage)} of the bytes are int8"
    )
    print_line(
        f"{format_bytes(report.n_read_bytes)} -> {format_bytes(report.n_written_bytes)} "
        f"({format_percent(report.n_written_bytes / max(1, report.n_read_bytes))}) "
        f"in {format_shards(report.n_shards)}, {format_seconds(report.elapsed_s)} on {report.device}, "
        f"{format_bytes(report.n_read_bytes / report.elapsed_s)}/s"
    )
    print_table(
        "Weight error (signal to quantization noise, higher is better)",
        ("layer kind", "tensors", "mean dB", "worst dB", "worst tensor"),
        [
            (e.layer_kind, f"{e.n_tensors}", _decibels(e.mean_sqnr_db), _decibels(e.worst_sqnr_db), e.worst_tensor)
            for e in report.errors
        ],
    )
    _print_kept([(kept.reason, kept.n_tensors, kept.n_parameters) for kept in report.kept], report.n_parameters)
    for name, n in report.non_finite.items():
        note(f"'{name}' was kept and holds {n:,} values that are NaN or infinite")


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"


def _print_kept(kept: list[tuple[str, int, int]], n_parameters: int) -> None:
    print_table(
        "Not int8",
        ("reason", "tensors", "parameters", "share"),
        [
            (reason, f"{tensors}", format_count(n), format_percent(n / max(1, n_parameters)))
            for reason, tensors, n in kept
        ],
    )


def _dry_run(
    src: str, options: dict[str, Any], min_coverage: float, workers: int | None, device: str, as_json: bool
) -> None:
    from int8convert.checkpoint.placement import place
    from int8convert.conversion.device import choose_device
    from int8convert.conversion.estimate import estimate
    from int8convert.conversion.job import check_coverage
    from int8convert.conversion.quantize import plan

    chosen = choose_device(device)
    conversion_plan = plan(src, **options)
    check_coverage(conversion_plan, min_coverage)
    costs = estimate(conversion_plan, workers, chosen)
    if as_json:
        print_json({"schema": 1, **conversion_plan.to_json(), **costs.to_json()})
        return
    for text in conversion_plan.model_map.notes:
        note(text)
    print_table(
        f"Plan for {src} ({conversion_plan.model_map.model_class or 'unknown class'}); nothing was written",
        ("shard", "int8", "kept", "read", "written"),
        [
            (
                shard.file_name,
                f"{sum(tensor.is_quantized for tensor in shard.tensors)}",
                f"{sum(not tensor.is_quantized for tensor in shard.tensors)}",
                format_bytes(shard.n_read_bytes),
                format_bytes(shard.n_bytes),
            )
            for shard in conversion_plan.shards
        ],
    )
    _print_kept([(r, *n) for r, n in conversion_plan.kept_by_reason().items()], conversion_plan.n_parameters)
    print_line(
        f"int8: {format_percent(conversion_plan.coverage)} of {format_count(conversion_plan.n_parameters)} parameters, "
        f"{format_percent(conversion_plan.byte_coverage)} of the bytes"
    )
    print_line(
        f"disk: {format_bytes(conversion_plan.n_read_bytes)} read, "
        f"{format_bytes(conversion_plan.n_written_bytes)} written"
    )
    as_source = place((tensor.source.name, tensor.source.n_bytes) for tensor in conversion_plan.tensors)
    as_int8 = place((tensor.output_name, tensor.output_bytes) for tensor in conversion_plan.tensors)
    print_line(f"GPUs that hold it: {format_gpus(as_int8)}; as it is now, {format_gpus(as_source)}")
    print_line(f"memory: at most about {format_bytes(costs.peak_memory_bytes)}")
    print_line(
        f"time: at least {format_seconds(costs.kernel_s)} of arithmetic on {costs.n_workers} threads"
        f"{'' if costs.device == 'cpu' else f' and {costs.device}, copies included'}, "
        "measured now on this machine; the disk decides the rest"
    )
