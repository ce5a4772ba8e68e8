"""`int8convert export`: an int8 checkpoint for another loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli import console, options
from int8convert.cli.publishing import make_destination, print_published
from int8convert.text import counted, format_bytes, format_seconds
from int8convert.trace import recording

if TYPE_CHECKING:
    from int8convert.conversion.export import ExportReport

HELP = f"""Rewrite an int8 checkpoint for another loader, dequantize it, or cut it into other shards.

OUT is an int8 checkpoint of int8convert, bitsandbytes, compressed-tensors or torchao. It is only read. NEW gets the
same int8 codes, and their scales in its own format. Nothing is quantized again.

After an interruption, a kill or a full disk, run the same command again: it resumes after the finished shards.

\b
Examples:
  int8convert export ./opt-66b-int8 ./opt-66b-vllm --format compressed-tensors
  int8convert export me/opt-66b-int8 --format compressed-tensors --upload me/opt-66b-vllm
  int8convert export ./opt-66b-int8 ./opt-66b-fp16 --dequantize float16 --max-shard-size 5GB

{options.EXIT_CODES}
"""


def export(
    context: typer.Context,
    out: options.Int8Checkpoint,
    new: Annotated[
        str | None,
        typer.Argument(
            metavar="NEW", callback=options.check_named, help="The directory to write. Optional with --upload."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="bitsandbytes, compressed-tensors or torchao."),
    ] = None,
    dequantize: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Write weights as float16, bfloat16 or float32 in place of int8."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=options.check_size,
            help="Largest output shard, e.g. 5GB.  [default: one shard for each shard of OUT]",
        ),
    ] = None,
    workers: options.Workers = None,
    revision: options.Revision = None,
    reader: options.ReaderName = "auto",
    cache_dir: options.CacheDir = None,
    upload: options.Upload = None,
    keep: options.Keep = False,
    max_disk: options.MaxDisk = None,
    private: options.Private = None,
    no_xet: options.NoXet = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in NEW or REPO.")] = False,
    check: options.Check = False,
    trace: options.TraceFile = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    options.turn_off_xet(no_xet)
    _check_combination(context, out)
    if new is None and upload is not None:
        new = f"int8convert-{upload.rpartition('/')[2]}"
    resumable = console.RESUMABLE if upload is None else console.RESUMABLE_THERE
    with console.reporting_errors(as_json, resumable), console.quieting_hub(), recording(trace):
        from int8convert.cli.progress import SKIPPED, showing_progress
        from int8convert.conversion import export as conversion
        from int8convert.conversion.readers import Reader, Reading
        from int8convert.formats.format import Format
        from int8convert.formats.int8_checkpoint import DTYPES

        options.check_choice(format, Format, "--format")
        options.check_choice(dequantize, DTYPES, "--dequantize")
        skipped = f"{SKIPPED}{', sha256 checked' if check else ''}"
        with showing_progress(quiet, as_json, "reading the scales", skipped) as on_event:
            destination = make_destination(upload, private, keep, max_disk, on_event)
            report = conversion.export(
                out,
                new or "",
                format=format,
                dequantize=dequantize,
                max_shard_size=max_shard_size,
                workers=workers,
                overwrite=overwrite,
                check=check,
                reading=Reading(Reader(reader), cache_dir, revision),
                destination=destination,
                on_event=on_event,
            )
        there = destination.outcome()
        if as_json:
            console.print_json({**report.to_json(), "upload": there})
            return
        _print_report(report, there["url"] if there else report.out or "")
        if upload is not None and there is not None:
            print_published(upload, there, out)


def _check_combination(context: typer.Context, out: str) -> None:
    """Refuse options that contradict each other or have no effect."""
    given = set(options.given_options(context))
    if {"format", "dequantize"} <= given:
        raise options.UsageError("give --format or --dequantize, not both")
    if not given & {"format", "dequantize", "max_shard_size"}:
        raise options.UsageError("give --format, --dequantize or --max-shard-size")
    if {"dequantize", "upload"} <= given:
        raise options.UsageError("--upload sends int8 checkpoints; send a dequantized one by `hf upload`")
    if not given & {"new", "upload"}:
        raise options.UsageError("NEW is missing: name the directory to write, or pass --upload REPO")
    options.check_upload_options(context)
    for name in ("revision", "reader", "cache_dir", *(() if "upload" in given else ("no_xet",))):
        if name in given:
            options.check_remote(options.option_name(name), out, "checkpoints")


def _print_report(report: ExportReport, place: str) -> None:
    console.print_line(
        f": {report.n_int8_weights} int8 weights of {report.source_format} as {report.format or report.dtype}",
        head=place,
    )
    console.print_line(
        f"{format_bytes(report.n_read_bytes)} -> {format_bytes(report.n_written_bytes)} "
        f"in {counted(report.n_shards, 'shard')}, {format_seconds(report.elapsed_s)}"
    )
    if report.n_changed_scales:
        console.note(
            f"{counted(report.n_changed_scales, 'scale')} of another tool cannot be stored as absmax / 127: each moved "
            "by one unit in its last place"
        )
