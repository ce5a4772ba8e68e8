"""`quantize --dry-run`: the plan of a conversion and its costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from int8convert.cli.console import describe_error, failure, note, print_json, print_line, print_table
from int8convert.errors import NOTHING_WRITTEN, Int8ConvertError, stating
from int8convert.text import format_bytes, format_count, format_percent, format_seconds

if TYPE_CHECKING:
    from int8convert.conversion.cost import ConversionCosts, FetchCosts
    from int8convert.conversion.destination import Destination
    from int8convert.conversion.disk_budget import DiskBudget
    from int8convert.planning.pending_plan import PlanRequirements
    from int8convert.planning.plan import ConversionPlan
    from int8convert.planning.plan_checkpoint import PlanOptions


def print_kept(kept: list[tuple[str, int, int]], n_parameters: int) -> None:
    """Print what does not become int8, by reason: tensors and parameters."""
    print_table(
        "Not int8",
        ("reason", "tensors", "parameters", "share"),
        [
            (reason, f"{tensors}", format_count(n), format_percent(n / max(1, n_parameters)))
            for reason, tensors, n in kept
        ],
    )


@dataclass(frozen=True, slots=True)
class DryRun:
    """Options that decide what a conversion costs.

    Attributes:
        out: the directory to write; None for the current one.
        destination: where finished shards go.
        workers: threads; None for one on each core.
        device, reader: as `quantize` takes them.
        bandwidth: bytes a second from the Hub, as a size; None if unknown.
    """

    out: str | None
    destination: Destination
    workers: int | None
    device: str
    reader: str
    bandwidth: str | None


def print_plan(src: str, options: PlanOptions, run: DryRun, as_json: bool) -> None:
    """Print the plan of a conversion and its costs.

    Raises:
        Int8ConvertError: there is no plan; or, after it was printed, `quantize` would refuse it.
    """
    from int8convert.conversion.cost import estimate, estimate_disk, estimate_fetch
    from int8convert.conversion.device import choose_device
    from int8convert.conversion.readers import Reader
    from int8convert.planning.pending_plan import PlanRequirements
    from int8convert.planning.plan_checkpoint import plan_unchecked
    from int8convert.text import parse_size

    chosen = choose_device(run.device)
    requirements = PlanRequirements(options.min_coverage, tuple(options.allow_missing))
    conversion_plan = plan_unchecked(src, options)
    costs = estimate(conversion_plan, run.workers, chosen)
    disk = estimate_disk(conversion_plan, Path(run.out or "."), run.destination)
    fetch = estimate_fetch(
        conversion_plan,
        costs.n_workers,
        Path(options.cache_dir) if options.cache_dir is not None else None,
        parse_size(run.bandwidth),
        Reader(run.reader),
        disk.n_spare_bytes,
    )
    if as_json:
        refusal = _refusal(requirements, conversion_plan)
        print_json(
            {
                "schema": 1,
                **({"error": describe_error(refusal)} if refusal else {}),
                **conversion_plan.to_json(),
                **costs.to_json(),
                "disk_bytes": disk.n_bytes,
                "fetch": fetch.to_json() if fetch else None,
                "reader": fetch and fetch.reader,
                "reader_reason": fetch and (fetch.reason or None),
                "upload": run.destination.url and {"url": run.destination.url, "commit": None},
            }
        )
        if refusal is not None:
            raise failure(refusal)
        return
    _print_shards(src, conversion_plan)
    print_kept([(r, *n) for r, n in conversion_plan.kept_by_reason().items()], conversion_plan.n_parameters)
    _print_sizes(conversion_plan)
    _print_costs(costs, disk, fetch)
    _print_upload(run.destination, disk.n_bytes)
    requirements.check(conversion_plan)


def _print_shards(src: str, conversion_plan: ConversionPlan) -> None:
    """Print the notes of a plan, and a table of its output shards."""
    for text in conversion_plan.model_map.notes:
        note(text)
    commit = conversion_plan.source.commit
    print_table(
        f"Plan for {src}{f' at {commit[:12]}' if commit else ''} "
        f"({conversion_plan.model_map.model_class or 'unknown class'}); nothing was written",
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


def _print_upload(destination: Destination, n_bytes: int) -> None:
    """Print how much of an output that is sent elsewhere is on the local disk."""
    if destination.url is None:
        return
    there = f"whether {destination.url} accepts it was not checked"
    if destination.keeps:
        print_line(f"--upload: {format_bytes(n_bytes)} stay here; {there}")
    else:
        print_line(f"--upload: at most {format_bytes(n_bytes)} of the output on this disk at a time; {there}")


def _refusal(requirements: PlanRequirements, conversion_plan: ConversionPlan) -> Int8ConvertError | None:
    try:
        with stating(NOTHING_WRITTEN):
            requirements.check(conversion_plan)
    except Int8ConvertError as error:
        return error
    return None


def _print_sizes(conversion_plan: ConversionPlan) -> None:
    print_line(
        f"int8: {format_percent(conversion_plan.coverage)} of {format_count(conversion_plan.n_parameters)} parameters, "
        f"{format_percent(conversion_plan.byte_coverage)} of the bytes"
    )
    print_line(
        f"disk: {format_bytes(conversion_plan.n_read_bytes)} read, "
        f"{format_bytes(conversion_plan.n_written_bytes)} written"
    )


def _print_costs(costs: ConversionCosts, disk: DiskBudget, fetch: FetchCosts | None) -> None:
    has_peak = costs.peak_memory_bytes > costs.work_memory_bytes
    peak = f" ({format_bytes(costs.peak_memory_bytes)} while transformers maps the model)" if has_peak else ""
    print_line(f"memory: at most about {format_bytes(costs.work_memory_bytes)}{peak}")
    seconds = f"at least {format_seconds(costs.kernel_s)}" if costs.kernel_s >= 0.1 else "under 0.1 s"
    print_line(
        f"time: {seconds} of arithmetic on {costs.n_workers} threads"
        f"{'' if costs.device == 'cpu' else f' and {costs.device}, copies included'}, "
        f"measured now; {'downloading and writing' if fetch else 'reading and writing'} come on top"
    )
    if fetch is None:
        return
    for reader, its in (("stream", fetch.stream), ("download", fetch.download)):
        chosen = f"; chosen{f': {fetch.reason}' if fetch.reason else ''}" if reader == fetch.reader else ""
        print_line(
            f"--reader {reader}: {format_bytes(disk.n_bytes + its.disk_bytes)} of disk, "
            f"{format_bytes(its.memory_bytes)} more memory{chosen}"
        )
    if not fetch.n_bytes:
        print_line("network: nothing to fetch, everything is in the cache")
        return
    time = "; pass --bandwidth for the time"
    if fetch.bytes_per_s and fetch.seconds is not None:
        time = f": {format_seconds(fetch.seconds)} at {format_bytes(fetch.bytes_per_s)}/s"
    print_line(f"network: {format_bytes(fetch.n_bytes)}{time}")
