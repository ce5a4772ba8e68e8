"""`export`: an int8 checkpoint rewritten for another loader, or dequantized, or in shards of another size.

1. Headers, config and scales of the source are read and checked, and the output is laid out: nothing is written yet.
2. Shard by shard, tensor by tensor, block by block: codes as they are, scales as the format wants them.
3. Small files last, config.json the very last.

Nothing is quantized anew. A run that fails or is interrupted removes what it wrote; it is not resumed, for it takes
about as long as copying the files. Memory: a megabyte block or two, and the headers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.loaders.shard_index import build_index
from int8convert.checkpoint.manifest import ShardRecord, describe_source
from int8convert.checkpoint.safetensors_file import METADATA_NAME
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.conversion.export_plan import ExportedShard, ExportPlan, make_export_plan
from int8convert.conversion.export_tensors import ItemWriter, Target
from int8convert.conversion.output import OutputDirectory
from int8convert.conversion.output_place import as_output_error
from int8convert.errors import DiskFullError, Int8ConvertError, OutputError, SourceError, stating
from int8convert.events import EventSink, ShardFinished, ignore
from int8convert.formats.format import Format
from int8convert.formats.int8_checkpoint import DTYPES, SourceReaders, open_int8_checkpoint
from int8convert.sources import is_repository_name, open_source
from int8convert.text import parse_size, quoted


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The outcome of `export`.

    Attributes:
        source, out: as named by the caller.
        source_format, format: quant_method before and after; None if dequantized.
        dtype: what the weights were dequantized to; None if they were not.
        n_int8_weights: weights of modules that are int8 in the source.
        n_changed_scales: rows whose scale no absmax gives back exactly, so that it moved by one unit in the last place.
        elapsed_s: seconds of wall time.
    """

    source: str
    out: str
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

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


@stating("nothing was written")
def export(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    dequantize: str | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    on_event: EventSink | None = None,
) -> ExportReport:
    """Rewrite an int8 checkpoint for another loader, dequantize it, or only cut it into other shards.

    The codes stay as they are. A scale that goes from one format to another and back is the same, bit for bit, if the
    weights were quantized from fp16 or bf16; `scales` tells what else can happen. Dequantized weights are those the
    source's own loader computes, rounded to `dequantize`.

    Args:
        src: an int8 checkpoint of bitsandbytes, compressed-tensors or torchao, written by int8convert or by them.
        out: the directory to write; must not exist or be empty, unless `overwrite`.
        format: "bitsandbytes", "compressed-tensors" or "torchao"; None keeps that of the source.
        dequantize: "float16", "bfloat16" or "float32", for weights that are not int8; other tensors stay as they are.
        max_shard_size: bytes, or a string such as "5GB"; None makes one output shard for each source shard.
        overwrite: replace a checkpoint in `out`.
        on_event: receives `ShardFinished`.

    Raises:
        Int8ConvertError: what went wrong, and what to do; what was written is removed.
        ValueError: an argument is out of its range, or there is nothing to change.
    """
    began = time.perf_counter()
    check_choice(format, dequantize, max_shard_size)
    max_shard_bytes = parse_size(max_shard_size)
    if is_repository_name(src):  # its shards would be read by range, which has no hash
        raise SourceError(
            f"no directory {quoted(str(src), 200)} is here, and export takes directories, not repositories on the Hub",
            f"fetch the repository by `hf download {src} --local-dir DIR`, and name DIR",
        )
    source = open_source(src)
    _check_outside(Path(out), source.directory)
    checkpoint = open_int8_checkpoint(source)
    wanted = Format(format) if format else None if dequantize else checkpoint.format
    plan = make_export_plan(
        checkpoint, Target(checkpoint.format, wanted, DTYPES.get(dequantize or "", "")), max_shard_bytes
    )
    request = {
        "format": str(wanted) if wanted else dequantize,
        "source": describe_source(source),
        "options": {"max_shard_bytes": max_shard_bytes},
    }
    output = OutputDirectory(out, source, request, overwrite)
    if output.is_complete and not overwrite:
        raise OutputError(
            f"OUT '{out}' holds this very export already",
            "name another directory, or pass --overwrite to write it again",
        )
    with output.in_use():
        needed = plan.n_written_bytes + sum(path.stat().st_size for path in source.auxiliary_files)
        if needed > output.free_bytes():
            raise DiskFullError(
                f"OUT '{out}' needs {needed:,} bytes, its disk has {output.free_bytes():,} free",
                "make room, or name a directory on another disk, and rerun the same command",
            )
        with _leaving_nothing(output):
            output.begin({}, len(plan.shards))
            n_changed = _write(plan, output, on_event or ignore)
    return ExportReport(
        source=source.label,
        out=str(out),
        source_format=str(checkpoint.format),
        format=str(wanted) if wanted else None,
        dtype=dequantize,
        n_shards=len(plan.shards),
        n_read_bytes=source.n_bytes,
        n_written_bytes=plan.n_written_bytes,
        n_int8_weights=len(checkpoint.weights),
        n_changed_scales=n_changed,
        notes=(*source.notes, *plan.notes),
        elapsed_s=time.perf_counter() - began,
    )


def check_choice(format: str | None, dequantize: str | None, max_shard_size: int | str | None) -> None:
    """Raise a ValueError unless the options ask for something, and for one thing."""
    if format is not None and format not in tuple(Format):
        raise ValueError(f"format must be one of {', '.join(Format)}, not {format!r}")
    if dequantize is not None and dequantize not in DTYPES:
        raise ValueError(f"dequantize must be one of {', '.join(DTYPES)}, not {dequantize!r}")
    if format and dequantize:
        raise ValueError("format and dequantize exclude each other: one is of int8 weights, the other has none")
    if format is None and dequantize is None and max_shard_size is None:
        raise ValueError("nothing to change: give a format, dequantize or max_shard_size")


def _check_outside(new: Path, out: Path) -> None:
    """Refuse to write into the checkpoint that is read: `verify` would find files there that are none of its own."""
    if any(folder.exists() and folder.samefile(out) for folder in new.resolve().parents):
        raise OutputError(
            f"NEW {quoted(str(new), 200)} lies inside OUT {quoted(str(out), 200)}",
            "name a directory outside OUT",
        )


@contextmanager
def _leaving_nothing(output: OutputDirectory) -> Iterator[None]:
    """Whatever stops the body, what it wrote is removed; OSErrors here are the output's."""
    try:
        yield
    except BaseException as error:
        output.discard()
        if not isinstance(error, OSError | Int8ConvertError):
            raise
        told = as_output_error(error, output.path) if isinstance(error, OSError) else error
        told.state = "what this run had written was removed"
        raise told from error


def _write(plan: ExportPlan, output: OutputDirectory, emit: EventSink) -> int:
    """Write all files; the number of scales that changed."""
    records = []
    n_changed = 0
    for i, shard in enumerate(plan.shards):
        writer = ShardWriter(output.path / shard.file_name, shard.outputs)
        try:
            n_changed += _write_items(shard, plan.target, writer)
            sha256 = writer.commit()
        finally:
            writer.discard()
        records.append(ShardRecord(shard.file_name, shard.n_bytes, sha256, "", {}, {}))
        emit(ShardFinished(i, len(plan.shards), shard.file_name, shard.n_bytes))
    summary = {
        "tool": f"int8convert {__version__}",
        "source_format": str(plan.target.source_format),
        "n_changed_scales": n_changed,
    }
    index = None
    if len(plan.shards) > 1:
        weight_map = {name: s.file_name for s in plan.shards for name in s.outputs if name != METADATA_NAME}
        index = build_index(weight_map, plan.n_tensor_bytes, plan.n_parameters)
    output.complete(plan.source, plan.config, index, summary, records)
    return n_changed


def _write_items(shard: ExportedShard, target: Target, writer: ShardWriter) -> int:
    with SourceReaders() as readers:
        items = ItemWriter(target, readers, writer)
        for item in shard.items:
            items.write(item)
        return items.n_changed_scales
