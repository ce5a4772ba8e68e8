"""`export`: an int8 checkpoint rewritten for another loader, or dequantized, or in shards of another size.

It runs on the pipeline of `quantize`, by another plan: nothing is quantized. Codes are copied, scales recoded.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.manifest import EXPORT_ARITHMETIC_VERSION
from int8convert.checkpoint.model_card import read_source_card
from int8convert.conversion.destination import Destination, LocalDestination
from int8convert.conversion.device import CPU
from int8convert.conversion.job import Conversion
from int8convert.conversion.output import OutputDirectory
from int8convert.conversion.readers import Reading
from int8convert.errors import NOTHING_WRITTEN, OutputError, stating
from int8convert.events import Event, EventSink, PlanMade, ShardSkipped
from int8convert.formats.format import Format
from int8convert.formats.int8_checkpoint import DTYPES, open_int8_checkpoint
from int8convert.planning.export_plan import ExportPlan, Target, make_export_plan
from int8convert.planning.request_difference import describe_source
from int8convert.progress_bar import sink_or_bar
from int8convert.sources import open_source
from int8convert.text import parse_size, quoted
from int8convert.trace import span


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The outcome of `export`.

    Attributes:
        source, out: as named by the caller; `out` is None if it was published and removed.
        source_format, format: quant_method before and after; None if dequantized.
        dtype: what the weights were dequantized to; None if they were not.
        n_int8_weights: weights of modules that are int8 in the source.
        n_changed_scales: rows whose scale no absmax gives back exactly, so that it moved by one unit in the last place.
        elapsed_s: seconds of wall time.
        commit: commit of the source on the Hub; None for a directory.
        reader, reader_reason: how shards were read from the Hub; the reason is None if the user chose. None if none
            were.
        n_done_shards: shards that an earlier run finished.
    """

    source: str
    out: str | None
    source_format: str
    format: str | None
    dtype: str | None
    n_shards: int
    n_read_bytes: int
    n_written_bytes: int
    n_int8_weights: int
    n_changed_scales: int
    notes: tuple[str, ...]
    elapsed_s: float
    commit: str | None = None
    reader: str | None = None
    reader_reason: str | None = None
    n_done_shards: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


@stating(NOTHING_WRITTEN)
def export(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    dequantize: str | None = None,
    max_shard_size: int | str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    check: bool = False,
    reading: Reading | None = None,
    destination: Destination | None = None,
    on_event: EventSink | None = None,
) -> ExportReport:
    """Rewrite an int8 checkpoint for another loader, dequantize it, or only cut it into other shards.

    The codes stay as they are. A scale that goes from one format to another and back is the same, bit for bit, if the
    weights were quantized from fp16 or bf16; `formats.scales` tells what else can happen. Dequantized weights are those
    that the source's own loader computes, rounded to `dequantize`. An export that is interrupted resumes as `quantize`
    does.

    Args:
        src: an int8 checkpoint of bitsandbytes, compressed-tensors or torchao, written by int8convert or by them: a
            directory, or the name of a repository on the Hub.
        out: the directory to write; must not exist, be empty, or hold an unfinished export of the same source with the
            same options, unless `overwrite`.
        format: "bitsandbytes", "compressed-tensors" or "torchao"; None keeps that of the source.
        dequantize: "float16", "bfloat16" or "float32", for weights that are not int8; other tensors stay as they are.
        max_shard_size: bytes, or a string such as "5GB"; None makes one output shard for each source shard.
        workers: threads; None takes the cores this process may use.
        overwrite: replace a checkpoint in `out`.
        check: when resuming, trust finished shards by their sha256 and not only by their size.
        reading: how a repository is read; None takes the defaults.
        destination: where finished shards go; None keeps them in `out`.
        on_event: receives events; None shows a tqdm bar.

    Raises:
        Int8ConvertError: what went wrong, and what to do.
        ValueError: an argument is out of its range, or there is nothing to change.
    """
    began = time.perf_counter()
    check_choice(format, dequantize, max_shard_size)
    n_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if n_workers < 1:
        raise ValueError("workers must be at least 1")
    reading, destination = reading or Reading(), destination or LocalDestination()
    if dequantize and destination.url is not None:
        raise ValueError("only int8 checkpoints are published: dequantize into a directory")
    max_shard_bytes = parse_size(max_shard_size)
    source = open_source(src, reading.revision, reading.cache_dir)
    if source.commit is None:
        _check_outside(Path(out), source.directory)
    checkpoint = open_int8_checkpoint(source)
    wanted = Format(format) if format else None if dequantize else checkpoint.format
    target = Target(checkpoint.format, wanted, DTYPES.get(dequantize or "", ""))
    with span("plan"):
        plan = make_export_plan(checkpoint, target, max_shard_bytes)
    request = {
        "export_arithmetic": EXPORT_ARITHMETIC_VERSION,
        "format": target.name,
        "source": describe_source(source),
        "options": {"max_shard_bytes": max_shard_bytes},
    }
    output = OutputDirectory(out, source, request, overwrite)
    job = Conversion(output, destination, reading, check)
    seen: list[Event] = []
    with sink_or_bar(on_event, "export") as sink, output.in_use(), job.stating_progress():

        def emit(event: Event) -> None:
            if isinstance(event, PlanMade | ShardSkipped):
                seen.append(event)
            sink(event)

        job.run(plan, plan.config, _summary(plan), n_workers, CPU, emit)
    if not destination.keeps:
        output.remove_empty()
    return _report(plan, seen, str(out) if destination.keeps else None, time.perf_counter() - began)


def check_choice(format: str | None, dequantize: str | None, max_shard_size: int | str | None) -> None:
    """Raise a ValueError unless the options ask for something, and for one thing."""
    if format is not None and format not in tuple(Format):
        raise ValueError(f"format must be one of {', '.join(Format)}, not {format!r}")
    if dequantize is not None and dequantize not in DTYPES:
        raise ValueError(f"dequantize must be one of {', '.join(DTYPES)}, not {dequantize!r}")
    if format and dequantize:
        raise ValueError("give format or dequantize, not both: a dequantized checkpoint has no int8 format")
    if format is None and dequantize is None and max_shard_size is None:
        raise ValueError("nothing to change: give a format, dequantize or max_shard_size")


def _check_outside(new: Path, out: Path) -> None:
    """Refuse to write into the checkpoint that is read: `verify` would find files there that do not belong to it."""
    if any(folder.exists() and folder.samefile(out) for folder in new.resolve().parents):
        raise OutputError(
            f"NEW {quoted(str(new), 200)} is inside OUT {quoted(str(out), 200)}",
            "name a directory outside OUT",
        )


def _summary(plan: ExportPlan) -> dict[str, Any]:
    """Return the entries of the manifest that are about the whole checkpoint."""
    return {
        "tool": f"int8convert {__version__}",
        "source_card": read_source_card(plan.source.directory),
        "source_format": str(plan.target.source_format),
        "n_changed_scales": plan.n_changed_scales,
    }


def _report(plan: ExportPlan, seen: list[Event], out: str | None, elapsed_s: float) -> ExportReport:
    made = next(event for event in seen if isinstance(event, PlanMade))
    target = plan.target
    return ExportReport(
        source=plan.source.label,
        out=out,
        source_format=str(target.source_format),
        format=str(target.format) if target.format else None,
        dtype=None if target.format else target.name,
        n_shards=len(plan.shards),
        n_read_bytes=plan.source.n_bytes,
        n_written_bytes=plan.n_written_bytes,
        n_int8_weights=plan.n_int8_weights,
        n_changed_scales=plan.n_changed_scales,
        notes=plan.notes,
        elapsed_s=elapsed_s,
        commit=plan.source.commit,
        reader=made.reader,
        reader_reason=made.reader_reason or None,
        n_done_shards=sum(isinstance(event, ShardSkipped) for event in seen),
    )
