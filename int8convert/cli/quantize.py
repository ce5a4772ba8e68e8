"""`int8convert quantize`: the main job on the command line."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from int8convert.cli.console import (
    RESUMABLE,
    RESUMABLE_THERE,
    print_json,
    quieting_hub,
    quieting_libraries,
    reporting_errors,
    wants_live_display,
)
from int8convert.cli.conversion_report import print_report
from int8convert.cli.dry_run import print_plan
from int8convert.cli.options import (
    AsJson,
    UsageError,
    check_bandwidth,
    check_choice,
    check_device,
    check_named,
    check_remote,
    check_size,
    given_options,
)
from int8convert.cli.publishing import make_destination, print_published
from int8convert.cli.static_set import calibrate_output, check_calibration, print_stored
from int8convert.events import ignore
from int8convert.runtime.text.texts import reusable_file

HELP = """Turn a checkpoint into an LLM.int8() checkpoint that transformers + bitsandbytes, or vLLM, load.

SRC is a directory with config.json and weights as safetensors or pytorch_model*.bin, whose files are only read; or the
name of a repository on the Hub, whose weights are read shard by shard without keeping them. OUT gets int8 weights with
their scales, everything else unchanged, and the small files that belong to a checkpoint. Interrupted, killed or out of
disk: the same command resumes after the finished shards.

\b
Examples:
  int8convert quantize ./opt-66b ./opt-66b-int8
  int8convert quantize facebook/opt-66b ./opt-66b-int8
  int8convert quantize facebook/opt-66b --dry-run --bandwidth 50MB
  int8convert quantize facebook/opt-66b --upload me/opt-66b-int8 --max-disk 20GB

Exit codes: 0 done; 1 failed; 2 wrong usage; 130 interrupted, 143 terminated.
"""


def _check_format(name: str) -> str:
    from int8convert.formats.format import QUANTIZE_FORMATS

    check_choice(name, QUANTIZE_FORMATS)
    return name


def _check_policy(policy: str) -> str:
    check_choice(policy, ("error", "keep"))
    return policy


def _check_reader(name: str) -> str:
    from int8convert.conversion.readers import Reader

    check_choice(name, Reader)
    return name


def quantize(
    context: typer.Context,
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC", callback=check_named, help="A checkpoint directory, or ORGANIZATION/NAME on the Hub."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", callback=check_named, help="The directory to write; not needed with --dry-run or --upload."
        ),
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
        typer.Option(
            metavar="FORMAT",
            callback=_check_format,
            help="bitsandbytes, for transformers; or compressed-tensors, for vLLM.",
        ),
    ] = "bitsandbytes",
    threshold: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="X", envvar="INT8CONVERT_THRESHOLD", help="Outlier threshold written for the loader."
        ),
    ] = 6.0,
    min_coverage: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=100.0,
            metavar="PERCENT",
            help="Fail if less of the parameters would become int8; default: if nearly all Linear weights stay 16-bit.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            callback=check_size,
            help="Largest output shard, e.g. 5GB; default: one shard for each of SRC's.",
        ),
    ] = None,
    on_nonfinite: Annotated[
        str,
        typer.Option(metavar="POLICY", callback=_check_policy, help="Weights no int8 can hold: error, or keep 16-bit."),
    ] = "error",
    lora: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Merge this PEFT adapter's directory into the weights.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Then run this text through OUT and store outlier columns in 16 bits."),
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-missing",
            metavar="PATTERN",
            help="Convert although SRC lacks these weights, e.g. 'score'; loaders make them up. Repeatable.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SRC's own code if transformers has no class for the model.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", envvar="INT8CONVERT_WORKERS", help="Threads; default: one for each core."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            callback=check_device,
            envvar="INT8CONVERT_DEVICE",
            help="Where rows are quantized: cpu, cuda[:n], or auto, which is the CPU.",
        ),
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="SRC's branch, tag or commit on the Hub; default: main.")
    ] = None,
    reader: Annotated[
        str,
        typer.Option(
            metavar="READER",
            callback=_check_reader,
            envvar="INT8CONVERT_READER",
            help="How to read Hub weights: stream (no extra disk), download (up to two shards on disk), or auto "
            "(whichever fits).",
        ),
    ] = "auto",
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what is downloaded from the Hub in this cache.")
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", callback=check_bandwidth, help="With --dry-run: bytes a second from the Hub, e.g. 50MB."
        ),
    ] = None,
    upload: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Send each finished shard to this repository, and keep none here."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="With --upload: keep OUT, too.")] = False,
    max_disk: Annotated[
        str | None,
        typer.Option(metavar="SIZE", callback=check_size, help="With --upload: use at most this much disk, e.g. 20GB."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="With --upload: who sees a new repository; default: the account's setting."
        ),
    ] = None,
    no_xet: Annotated[bool, typer.Option("--no-xet", help="Do not use the Hub's xet protocol.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT, or REPO.")] = False,
    check: Annotated[bool, typer.Option("--check", help="When resuming, check finished shards by sha256.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; notes are printed.")] = False,
) -> None:
    if no_xet:
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # read when huggingface_hub is imported, which it is not yet
    _check_combination(context, src)
    if out is None and upload is not None:
        out = f"int8convert-{upload.rpartition('/')[2]}"
    resumable = RESUMABLE if upload is None else RESUMABLE_THERE
    with (
        reporting_errors(as_json, "nothing was written" if dry_run else resumable),
        quieting_hub(),
        reusable_file(calibrate) as text,
    ):
        from int8convert.planning.plan_checkpoint import PlanOptions

        options = PlanOptions(
            skip=skip or (),
            only=only or (),
            format=format,
            max_shard_size=max_shard_size,
            lora=lora,
            trust_remote_code=trust_remote_code,
            allow_missing=allow_missing or (),
            min_coverage=min_coverage / 100 if min_coverage is not None else None,
            revision=revision,
            cache_dir=cache_dir,
        )
        if dry_run:
            destination = make_destination(upload, private, keep, max_disk, ignore)
            print_plan(src, out, options, workers, device, reader, bandwidth, destination, as_json)
            return
        from int8convert.cli.progress import SKIPPED, showing_progress
        from int8convert.conversion.quantize import quantize as run

        if text is not None:
            with quieting_libraries(False):
                check_calibration(src, text, revision, cache_dir)
        skipped = f"{SKIPPED}{', sha256 checked' if check else ''}"
        with showing_progress(quiet, as_json, "reading the model class", skipped) as on_event:
            destination = make_destination(upload, private, keep, max_disk, on_event)
            report = run(
                src,
                out or "",
                options,
                threshold=threshold,
                on_nonfinite=on_nonfinite,
                workers=workers,
                device=device,
                overwrite=overwrite,
                check=check,
                reader=reader,
                destination=destination,
                on_event=on_event,
            )
        stored = None
        if text is not None:
            with quieting_libraries(wants_live_display(quiet, as_json)):
                stored = calibrate_output(src, out or "", text, lora, trust_remote_code, device)
        there = destination.outcome()
        if as_json:
            print_json({**report.to_json(), "outliers": stored and asdict(stored), "upload": there})
            return
        print_report(report, there["url"] if there else report.out)
        if upload is not None and there is not None:
            print_published(upload, there, src)
        if stored is not None:
            print_stored(stored)


def _check_combination(context: typer.Context, src: str) -> None:
    """Refuse options that contradict each other or have no effect."""
    given = set(given_options(context))
    if not given & {"out", "upload", "dry_run"}:
        raise UsageError("OUT is missing: name the directory to write, or pass --dry-run, or --upload REPO")
    needs = {"keep": "upload", "max_disk": "upload", "private": "upload", "bandwidth": "dry_run"}
    for name, needed in needs.items():
        if name in given and needed not in given:
            option = "--public" if context.params[name] is False else _option(name)
            raise UsageError(f"{option} needs {'--upload REPO' if needed == 'upload' else '--dry-run'}")
    if {"keep", "max_disk"} <= given:
        raise UsageError("--max-disk limits the local disk; --keep keeps all of OUT: give one of them")
    if {"upload", "calibrate"} <= given:
        raise UsageError("--calibrate stores columns after the last shard: convert with it, then int8convert upload")
    for name in ("revision", "reader", "cache_dir", "bandwidth"):
        if name in given:
            check_remote(_option(name), src, "sources")


def _option(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"
