"""`quantize --dry-run`: the plan of a conversion, and what it will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from int8convert.cli.console import (
    format_bytes,
    format_count,
    format_gpus,
    format_percent,
    format_seconds,
    note,
    print_json,
    print_line,
    print_table,
)

if TYPE_CHECKING:
    from int8convert.conversion.estimate import ConversionCosts, FetchCosts
    from int8convert.conversion.plan import ConversionPlan


def print_kept(kept: list[tuple[str, int, int]], n_parameters: int) -> None:
    """What does not become int8, by reason: tensors and parameters."""
    print_table(
        "Not int8",
        ("reason", "tensors", "parameters", "share"),
        [
            (reason, f"{tensors}", format_count(n), format_percent(n / max(1, n_parameters)))
            for reason, tensors, n in kept
        ],
    )


def print_plan(
    src: str,
    options: dict[str, Any],
    min_coverage: float,
    workers: int | None,
    device: str,
    bandwidth: str | None,
    as_json: bool,
) -> None:
    """Print what `quantize` would do with these options, and what that would cost."""
    from int8convert.conversion.coming_plan import check_coverage
    from int8convert.conversion.device import choose_device
    from int8convert.conversion.estimate import estimate, estimate_fetch
    from int8convert.conversion.quantize import parse_size, plan

    chosen = choose_device(device)
    conversion_plan = plan(src, **options)
    check_coverage(conversion_plan, min_coverage)
    costs = estimate(conversion_plan, workers, chosen)
    fetch = estimate_fetch(conversion_plan, costs.n_workers, options["cache_dir"], parse_size(bandwidth))
    if as_json:
        print_json(
            {"schema": 1, **conversion_plan.to_json(), **costs.to_json(), "fetch": fetch.to_json() if fetch else None}
        )
        return
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
    print_kept([(r, *n) for r, n in conversion_plan.kept_by_reason().items()], conversion_plan.n_parameters)
    _print_sizes(conversion_plan)
    _print_costs(conversion_plan, costs, fetch)


def _print_sizes(conversion_plan: ConversionPlan) -> None:
    from int8convert.checkpoint.placement import place

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


def _print_costs(conversion_plan: ConversionPlan, costs: ConversionCosts, fetch: FetchCosts | None) -> None:
    print_line(f"memory: at most about {format_bytes(costs.peak_memory_bytes)}")
    print_line(
        f"time: at least {format_seconds(costs.kernel_s)} of arithmetic on {costs.n_workers} threads"
        f"{'' if costs.device == 'cpu' else f' and {costs.device}, copies included'}, "
        f"measured now on this machine; {'the network' if fetch else 'the disk'} decides the rest"
    )
    if fetch is None:
        return
    written = conversion_plan.n_written_bytes
    for reader, its in (("stream", fetch.stream), ("download", fetch.download)):
        print_line(
            f"--reader {reader}: {format_bytes(written + its.disk_bytes)} of disk, "
            f"{format_bytes(its.memory_bytes)} of memory more"
        )
    time = "; --bandwidth tells how long that takes"
    if fetch.bytes_per_s and fetch.seconds is not None:
        time = f": {format_seconds(fetch.seconds)} at {format_bytes(fetch.bytes_per_s)}/s"
    print_line(f"network: {format_bytes(fetch.n_bytes)}{time}")
