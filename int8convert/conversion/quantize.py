"""`quantize`: the main job as a plain function."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.checkpoint.manifest import ARITHMETIC_VERSION, Manifest
from int8convert.checkpoint.names import SMOOTHING_FILE, find_file
from int8convert.conversion.destination import Destination, LocalDestination
from int8convert.conversion.device import choose_device
from int8convert.conversion.job import Conversion
from int8convert.conversion.output import OutputDirectory
from int8convert.conversion.readers import Reader, Reading
from int8convert.conversion.records import plan_summary
from int8convert.conversion.report import ConversionReport, ReportBuilder
from int8convert.errors import NOTHING_WRITTEN, NonFiniteWeightError, stating
from int8convert.events import Event, EventSink, GroupsSmoothed, ModulesKept
from int8convert.hub.cached_copy import fetch_checkpoint, reading_cached
from int8convert.planning.calibrated_rounding import CALIBRATED
from int8convert.planning.kept_modules import KeepBudget, with_earlier_choice
from int8convert.planning.pending_plan import PlanRequest, PlanRequirements, plan_conversion
from int8convert.planning.plan_checkpoint import PlanOptions, open_request
from int8convert.planning.request_difference import describe_source, first_difference
from int8convert.planning.smoothing import Smoothing, read_factors
from int8convert.progress_bar import sink_or_bar
from int8convert.trace import span


@stating(NOTHING_WRITTEN)
def quantize(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PlanOptions | None = None,
    *,
    threshold: float = OUTLIER_THRESHOLD,
    on_nonfinite: str = "error",
    workers: int | None = None,
    device: str = "auto",
    reader: str = Reader.AUTO,
    overwrite: bool = False,
    check: bool = False,
    destination: Destination | None = None,
    on_event: EventSink | None = None,
) -> ConversionReport:
    """Turn a checkpoint into an LLM.int8() checkpoint that other tools load without int8convert.

    Weights are streamed, so memory does not grow with the model. Arguments, headers and free disk space are checked
    first. An error or a kill never leaves what looks like a complete checkpoint. Finished shards stay, and the same
    call resumes after them; the bytes are those of an undisturbed run.

    Args:
        src: a directory with config.json and safetensors or `.bin` weights; if no directory has that name, a repository
            on the Hub, ORGANIZATION/NAME.
        out: the directory to write; must not exist, be empty, or hold an unfinished conversion of the same source with
            the same options, unless `overwrite`.
        options: what becomes int8, in which format and files; None takes the defaults.
        threshold: magnitude from which a feature dimension counts as outlier. It is written for the loader and does
            not change the weights.
        on_nonfinite: "error", or "keep" to leave modules 16-bit whose weights hold NaN, infinity or what fp16 cannot.
        workers: threads; None takes the cores this process may use.
        device: where rows are quantized: "cpu", "cuda[:n]" (needs the extra cuda12 or cuda13), or "auto", which is the
            CPU. The output does not depend on it.
        reader: how to read Hub weights: "stream" (no extra disk), "download" (up to two of the source's shards on
            disk), or "auto" (the latter where it fits). The output does not depend on it.
        overwrite: replace a checkpoint in `out`.
        check: when resuming, trust finished shards by their sha256 and not only by their size.
        destination: where finished shards go; None keeps them in `out`. Where it keeps none, `out` holds those that are
            not sent yet, and is removed at the end.
        on_event: receives the events of `int8convert.events`; None shows a tqdm bar.

    Raises:
        Int8ConvertError: what went wrong, and what to do.
        ValueError: an argument is out of its range.
    """
    began = time.perf_counter()
    options = options or PlanOptions()
    n_workers = workers if workers is not None else len(os.sched_getaffinity(0))
    _check_ranges(options, n_workers, threshold, on_nonfinite)
    device_used = choose_device(device)
    cache = Path(options.cache_dir) if options.cache_dir is not None else None
    reading = Reading(Reader(reader), cache)
    request = open_request(src, options)
    recorded = _recorded_request(request, options, threshold, on_nonfinite)
    destination = destination or LocalDestination()
    requirements = PlanRequirements(options.min_coverage, tuple(options.allow_missing))
    report = ReportBuilder()
    with ExitStack() as stack:
        sink = stack.enter_context(sink_or_bar(on_event, "quantize"))

        def emit(event: Event) -> None:
            report(event)
            sink(event)

        if request.smoothing is not None:
            there = Manifest(Path(out)).read_request()
            wanted = with_earlier_choice(there, recorded) if options.keep is not None else recorded
            smoothing = _smoothing(request, request.smoothing, out, wanted, overwrite, threshold, emit)
            request = replace(request, smoothing=smoothing)
        if options.keep is not None:
            chosen = _chosen_modules(options.keep, request, out, recorded, overwrite, emit)
            request = replace(request, modules=replace(request.modules, skip=(*options.skip, *chosen)))
            recorded["options"]["skip"] += chosen
        factors = request.smoothing.factors.content() if request.smoothing and request.smoothing.factors else None
        output = OutputDirectory(out, request.source, recorded, overwrite, factors)
        job = Conversion(output, destination, reading, check)
        stack.enter_context(output.in_use())
        stack.enter_context(job.stating_progress())
        while True:
            with span("plan"):
                plan = plan_conversion(request)
            requirements.check(plan)
            try:
                job.run(plan, plan.config(threshold), plan_summary(plan), n_workers, device_used, emit)
                break
            except NonFiniteWeightError as error:
                if on_nonfinite == "error" or error.module_name in request.kept_modules:
                    raise
                request = replace(request, kept_modules=(*request.kept_modules, error.module_name))
                report.restart()
    if not destination.keeps:
        output.remove_empty()
    kept = str(out) if destination.keeps else None
    return report.build(plan, kept, device_used.name, time.perf_counter() - began)


def _chosen_modules(
    keep: KeepBudget,
    request: PlanRequest,
    out: str | os.PathLike[str],
    recorded: Mapping[str, Any],
    overwrite: bool,
    emit: EventSink,
) -> tuple[str, ...]:
    """Return the modules that a run before this one chose, or measure and choose."""
    there = Manifest(Path(out)).read_request()
    resumed = with_earlier_choice(there, recorded)
    if there is not None and first_difference(there, resumed) is None:
        kept = ModulesKept(tuple(resumed["options"]["skip"][len(request.modules.skip) :]))
    else:
        OutputDirectory(out, request.source, resumed, overwrite)  # refuses OUT before minutes of measuring
        kept = keep.choose(request, emit)
    emit(kept)
    return kept.names


def _smoothing(
    request: PlanRequest,
    smoothing: Smoothing,
    out: str | os.PathLike[str],
    recorded: Mapping[str, Any],
    overwrite: bool,
    threshold: float,
    emit: EventSink,
) -> Smoothing:
    """Return the factors that the user names, or those of a run before this one, or choose them."""
    there = Manifest(Path(out)).read_request()
    factors = smoothing.factors
    if factors is None and there is not None and first_difference(there, recorded) is None and not overwrite:
        earlier = find_file(Path(out), SMOOTHING_FILE)
        factors = read_factors(earlier) if earlier is not None else None
    if factors is not None:
        emit(GroupsSmoothed(len(factors.by_group)))
        return replace(smoothing, factors=factors)
    OutputDirectory(out, request.source, recorded, overwrite)  # refuses OUT before minutes of measuring
    from int8convert.conversion.smoothing_search import search_factors

    if request.source.commit is not None:
        fetch_checkpoint(request.source, emit)
    plan = plan_conversion(replace(request, source=reading_cached(request.source)))
    factors, chosen = search_factors(plan, smoothing.path, threshold, emit)
    emit(chosen)
    return replace(smoothing, factors=factors)


def _check_ranges(options: PlanOptions, n_workers: int, threshold: float, on_nonfinite: str) -> None:
    is_share = options.min_coverage is None or 0 <= options.min_coverage <= 1
    if n_workers < 1 or not threshold >= 0 or not is_share or on_nonfinite not in ("error", "keep"):
        raise ValueError(
            "workers must be at least 1, threshold at least 0, min_coverage between 0 and 1, on_nonfinite error or keep"
        )


def _recorded_request(
    request: PlanRequest, options: PlanOptions, threshold: float, on_nonfinite: str
) -> dict[str, Any]:
    """Return what two runs must have in common to be parts of one conversion."""
    recorded: dict[str, Any] = {
        **(
            options.keep.recorded() if options.keep is not None else {}
        ),  # first, so that another budget is named as the difference
        "skip": list(options.skip),
        "only": list(options.only),
        "threshold": float(threshold),
        "max_shard_bytes": request.max_shard_bytes,
        "on_nonfinite": on_nonfinite,
    }
    if request.adapter is not None:
        recorded["lora"] = request.adapter.identity()
    for name in ("rotate", "rotate_inputs"):
        if getattr(options, name):
            recorded[name] = True
    if request.smoothing is not None:
        recorded["smooth"] = request.smoothing.sha256
    if request.rounding is not None:
        recorded |= {"round": CALIBRATED, "calibration": request.rounding.identity()}
    if options.round_source is not None:
        recorded["round_source"] = options.round_source
    if options.allow_missing:
        recorded["allow_missing"] = list(options.allow_missing)
    return {
        "arithmetic": ARITHMETIC_VERSION,
        "format": request.modules.output_format,
        "source": describe_source(request.source),
        "options": recorded,
    }
