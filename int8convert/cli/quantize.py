"""`int8convert quantize`: the main job on the command line."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8convert.cli import console, options, quality_options
from int8convert.cli.conversion_report import print_report
from int8convert.cli.dry_run import DryRun, print_plan
from int8convert.cli.publishing import make_destination, print_published
from int8convert.cli.static_set import check_columns, print_stored, store_columns
from int8convert.errors import NOTHING_WRITTEN, stating
from int8convert.events import ignore
from int8convert.runtime.text.texts import reusable_file
from int8convert.trace import recording

if TYPE_CHECKING:
    from int8convert.conversion.report import ConversionReport
    from int8convert.outliers.store import StaticSet

HELP = f"""Convert a checkpoint to LLM.int8(), for transformers with bitsandbytes or for vLLM.

SRC is a directory with config.json and weights in safetensors or pytorch_model*.bin files. It is only read. SRC can
also be a repository on the Hub. Its weights are then read shard by shard, and none is kept without --cache-dir.

OUT gets int8 weights with their scales, all other tensors unchanged, and the checkpoint's small files. After an
interruption, a kill or a full disk, run the same command again: it resumes after the finished shards.

\b
Examples:
  int8convert quantize ./opt-66b ./opt-66b-int8
  int8convert quantize facebook/opt-66b ./opt-66b-int8
  int8convert quantize facebook/opt-66b --dry-run --bandwidth 50MB
  int8convert quantize facebook/opt-66b --upload me/opt-66b-int8
  int8convert quantize ./qwen3-8b ./qwen3-8b-int8 --format compressed-tensors --keep-budget 5% --text sample.txt

{options.EXIT_CODES}
"""

_OF_THE_RUN = ("threshold", "on_nonfinite", "columns", "keep_budget", "text", "quality", "overwrite", "check")
"""Options that a dry run does not need."""


def _check_format(name: str) -> str:
    from int8convert.formats.format import QUANTIZE_FORMATS

    options.check_choice(name, QUANTIZE_FORMATS)
    return name


def _check_policy(policy: str) -> str:
    options.check_choice(policy, ("error", "keep"))
    return policy


def _check_rounded(dtype: str | None) -> str | None:
    if dtype is not None:
        options.check_choice(dtype, ("float16", "bfloat16"))
    return dtype


def quantize(
    context: typer.Context,
    src: options.Source,
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT",
            callback=options.check_named,
            help="The directory to write. Optional with --dry-run or --upload.",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Leave these modules 16-bit, e.g. '*.fc2'. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PATTERN", help="Convert only these modules to int8. Repeatable."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            callback=_check_format,
            help="bitsandbytes, for transformers; or compressed-tensors, for vLLM.",
        ),
    ] = "bitsandbytes",
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="X",
            envvar="INT8CONVERT_THRESHOLD",
            help="Outlier threshold, written to config.json for the loader.",
        ),
    ] = 6.0,
    min_coverage: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=100.0,
            metavar="PERCENT",
            help="Fail if less of the parameters would become int8. By default, fail if nearly all Linear weights "
            "would stay 16-bit.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=options.check_size,
            help="Largest output shard, e.g. 5GB.  [default: one shard for each shard of SRC]",
        ),
    ] = None,
    on_nonfinite: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            callback=_check_policy,
            help="For weights that int8 cannot hold: error, or keep them 16-bit.",
        ),
    ] = "error",
    lora: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Merge the PEFT adapter in this directory into the weights.")
    ] = None,
    round_source: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            callback=_check_rounded,
            help="Round decoded low-bit weights to bfloat16 or float16 first, as transformers' dequantization does. By "
            "default, the exact float32 weights become int8.",
        ),
    ] = None,
    quality: quality_options.Quality = None,
    rotate: quality_options.Rotate = False,
    rotate_inputs: quality_options.RotateInputs = False,
    calibration: quality_options.Calibration = None,
    smooth: quality_options.Smooth = None,
    round: quality_options.Round = "nearest",
    columns: quality_options.Columns = None,
    keep_budget: quality_options.KeepPercent = None,
    text: quality_options.Text = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-missing",
            metavar="PATTERN",
            help="Convert although SRC lacks these weights, e.g. 'score'. Loaders will make up their values. "
            "Repeatable.",
        ),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    workers: options.Workers = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            callback=options.check_device,
            envvar="INT8CONVERT_DEVICE",
            help="Where rows are quantized: cpu, cuda[:n], or auto (the CPU).",
        ),
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of SRC on the Hub.  [default: main]")
    ] = None,
    reader: options.ReaderName = "auto",
    cache_dir: options.CacheDir = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=options.check_bandwidth,
            help="With --dry-run: estimate the download time at so many bytes a second, e.g. 50MB.",
        ),
    ] = None,
    upload: options.Upload = None,
    keep: options.Keep = False,
    max_disk: options.MaxDisk = None,
    private: options.Private = None,
    no_xet: options.NoXet = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT or REPO.")] = False,
    check: options.Check = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its costs, from headers alone.")
    ] = False,
    trace: options.TraceFile = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    _check_combination(context, src)
    options.turn_off_xet(no_xet)
    if out is None and upload is not None:
        out = f"int8convert-{upload.rpartition('/')[2]}"
    resumable = console.RESUMABLE if upload is None else console.RESUMABLE_THERE
    with (
        console.reporting_errors(as_json, NOTHING_WRITTEN if dry_run else resumable),
        console.quieting_hub(),
        recording(trace),
        quality_options.naming_best(quality),
        reusable_file(_columns_from(columns, calibration)) as columns_from,
        reusable_file(text) as kept_text,
    ):
        from int8convert.planning.plan_checkpoint import PlanOptions

        plan_options = PlanOptions(
            keep=None
            if dry_run or quality
            else quality_options.kept_by(keep_budget, kept_text, device, trust_remote_code),
            skip=skip or (),
            only=only or (),
            format=format,
            max_shard_size=max_shard_size,
            lora=lora,
            rotate=rotate,
            rotate_inputs=rotate_inputs,
            smooth=smooth,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing or (),
            min_coverage=min_coverage / 100 if min_coverage is not None else None,
            revision=revision,
            cache_dir=cache_dir,
            round=round,
            calibration=calibration,
            round_source=round_source,
        )
        if not as_json:
            _note_unused(context)
        if dry_run:
            with stating(NOTHING_WRITTEN):
                destination = make_destination(upload, private, keep, max_disk, ignore)
                print_plan(src, plan_options, DryRun(out, destination, workers, device, reader, bandwidth), as_json)
            return
        from int8convert.cli.progress import SKIPPED, showing_progress
        from int8convert.conversion.quantize import quantize as run

        if columns_from is not None:
            with console.quieting_libraries(False):
                check_columns(src, columns_from, revision, cache_dir)
        skipped = f"{SKIPPED}{', sha256 checked' if check else ''}"
        with (
            console.quieting_libraries(False) if keep_budget or quality else nullcontext(),
            showing_progress(quiet, as_json, "reading the model class", skipped) as on_event,
        ):
            destination = make_destination(upload, private, keep, max_disk, on_event)
            if quality is not None:
                plan_options = quality_options.best(
                    src, out or "", plan_options, keep_budget, kept_text, device, on_event
                )
            report = run(
                src,
                out or "",
                plan_options,
                threshold=threshold,
                on_nonfinite=on_nonfinite,
                workers=workers,
                device=device,
                reader=reader,
                overwrite=overwrite,
                check=check,
                destination=destination,
                on_event=on_event,
            )
        stored = None
        if columns_from is not None:
            with console.quieting_libraries(False), showing_progress(quiet, as_json) as on_event:
                stored = store_columns(src, out or "", columns_from, lora, trust_remote_code, device, on_event)
        _print_outcome(report, stored, upload, destination.outcome(), as_json)


def _columns_from(columns: str | None, calibration: Path | None) -> Path | None:
    """Return the folder or the text that chooses outlier columns; None if none are stored."""
    if columns == quality_options.CALIBRATED:
        return calibration
    return Path(columns) if columns is not None else None


def _print_outcome(
    report: ConversionReport, stored: StaticSet | None, upload: str | None, there: dict[str, Any] | None, as_json: bool
) -> None:
    if as_json:
        console.print_json({**report.to_json(), "outliers": stored and asdict(stored), "upload": there})
        return
    print_report(report, there["url"] if there else report.out)
    if upload is not None and there is not None:
        print_published(upload, there, report.source)
    if stored is not None:
        print_stored(stored)


def _note_unused(context: typer.Context) -> None:
    """Say which of the given options have no effect. --dry-run may be added to any command."""
    given = options.given_options(context)
    unused = [options.option_name(name) for name in _OF_THE_RUN if name in given] if "dry_run" in given else []
    if unused:
        console.note(f"no effect in a dry run: {', '.join(unused)}")
    elif "threshold" in given and not _holds_threshold(context.params["format"]):
        console.note(f"--threshold has no effect: a checkpoint in {context.params['format']} holds none")


def _holds_threshold(name: str) -> bool:
    """Return whether config.json of a format differs for different thresholds."""
    from int8convert.formats.format import Format
    from int8convert.formats.modules import module_of

    block = module_of(Format(name)).block
    return block((), 1.0) != block((), 2.0)


def _check_combination(context: typer.Context, src: str) -> None:
    """Refuse options that contradict each other or have no effect."""
    given = set(options.given_options(context))
    if not given & {"out", "upload", "dry_run"}:
        raise options.UsageError("OUT is missing: name the directory to write, or pass --dry-run, or --upload REPO")
    options.check_needs(context, {"bandwidth": "--dry-run"})
    quality_options.check(context)
    options.check_upload_options(context)
    if {"upload", "columns"} <= given:
        raise options.UsageError(
            "--columns stores columns after the last shard: convert with it, then int8convert upload"
        )
    for name in ("revision", "reader", "cache_dir", "bandwidth", *(() if "upload" in given else ("no_xet",))):
        if name in given:
            options.check_remote(options.option_name(name), src, "sources")
