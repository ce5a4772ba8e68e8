"""`int8convert export`: an int8 checkpoint for another loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from int8convert.cli.console import note, print_json, print_line, reporting_errors
from int8convert.cli.options import AsJson, UsageError, check_choice, check_named, check_size
from int8convert.text import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from int8convert.conversion.export import ExportReport

HELP = """Rewrite an int8 checkpoint for another loader, dequantize it, or cut it into other shards.

OUT is an int8 checkpoint, of int8convert, bitsandbytes, compressed-tensors or torchao; it is only read. NEW gets the
same int8 codes with their scales as the format has them; nothing is quantized anew. A run that is interrupted leaves
nothing and begins from the start: it takes about as long as copying.

\b
Examples:
  int8convert export ./opt-66b-int8 ./opt-66b-vllm --format compressed-tensors
  int8convert export ./opt-66b-int8 ./opt-66b-fp16 --dequantize float16 --max-shard-size 5GB

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""

_INTERRUPTED = "what was written was removed; the same command begins from the start"


def export(
    out: Annotated[str, typer.Argument(metavar="OUT", callback=check_named, help="The int8 checkpoint to read.")],
    new: Annotated[str, typer.Argument(metavar="NEW", callback=check_named, help="The directory to write.")],
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="bitsandbytes, compressed-tensors or torchao."),
    ] = None,
    dequantize: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="No int8: weights as float16, bfloat16 or float32."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", callback=check_size, help="Such as 5GB; default: one shard for each of OUT's."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in NEW.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; notes are printed.")] = False,
) -> None:
    with reporting_errors(as_json, _INTERRUPTED):
        from int8convert.cli.progress import showing_progress
        from int8convert.conversion import export as conversion
        from int8convert.formats.format import Format
        from int8convert.formats.int8_checkpoint import DTYPES

        check_choice(format, Format, "--format")
        check_choice(dequantize, DTYPES, "--dequantize")
        if format and dequantize:
            raise UsageError("give --format or --dequantize, not both")
        if not (format or dequantize or max_shard_size):
            raise UsageError("give --format, --dequantize or --max-shard-size")

        with showing_progress(quiet, as_json) as on_event:
            report = conversion.export(
                out,
                new,
                format=format,
                dequantize=dequantize,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                on_event=on_event,
            )
        if as_json:
            print_json(report.to_json())
        else:
            _print_report(report)


def _print_report(report: ExportReport) -> None:
    print_line(
        f": {report.n_int8_weights} int8 weights of {report.source_format} as {report.format or report.dtype}",
        head=report.out or "",
    )
    print_line(
        f"{format_bytes(report.n_read_bytes)} -> {format_bytes(report.n_written_bytes)} "
        f"in {counted(report.n_shards, 'shard')}, {format_seconds(report.elapsed_s)}"
    )
    for text in report.notes:
        note(text)
    if report.n_changed_scales:
        note(
            f"{report.n_changed_scales:,} scales are no absmax divided by 127, for another tool made them: each moved "
            "by one unit in its last place"
        )
