"""Time the CPU kernels on this machine, beside other libraries and beside the floor that the machine sets.

How it goes:
1. `bench_limits` measures what memory and the multipliers give at most, again in every round.
2. Rows: `row_quantize` on one and on two threads, of a matrix in memory and of blocks in the cache, beside copying the
   same bytes.
3. Layers: one Linear of 4,096 x 4,096 with 6 outlier columns, by torch in float32 and bfloat16, by bitsandbytes and by
   `ops.int8_linear`, for each number of tokens and threads.

Contestants take turns within a round; a round's time is the median of its calls, the result the median over rounds.
Every contestant has several copies of its layer and goes through them in turn, so that weights come from memory, as in
a model, and not from the cache.

The floor is the longer of two times: reading the int8 weights once, and multiplying them, both at the measured limit.

Left out on purpose: a comparison of results, which is what the tests are for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_convert import DISTURBED_SHARE, describe_machine, format_range, parse_count
from benchmarks.bench_limits import Limits, time_call
from cuda_kernels import cpu, ops
from cuda_kernels.cpu.threads import run_split
from cuda_kernels.reference import QuantizedWeight
from scripts.measure_command import read_busy_s

SIZE = 4096
N_TOKENS = (1, 16, 256)
N_THREADS = (1, 2)
OUTLIER_COLUMNS = [5, 100, 700, 1500, 3000, 4000]
N_LAYERS = 4
N_BLOCK_ROWS = 128
"""1 MiB of fp16: what a conversion reads at a time, and quantizes while it is in the caches."""
CALL_SECONDS = 0.3
OURS = ("int8, stored columns", "int8, stored and found")

Layer = Callable[[torch.Tensor], torch.Tensor]
Results = dict[str, list[float]]


def make_ours(weight: torch.Tensor, bias: torch.Tensor, capacity: int) -> Layer:
    columns = torch.tensor(OUTLIER_COLUMNS, dtype=torch.int32)
    side = weight[:, OUTLIER_COLUMNS].contiguous()
    quantized = QuantizedWeight(*ops.row_quantize(weight)[:2], side, bias)
    return lambda x: ops.int8_linear(x, quantized, columns, 6.0, capacity)


def make_theirs(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer.to("cpu").eval()


def make_torch(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> Layer:
    weight, bias = weight.to(dtype), bias.to(dtype)
    return lambda x: torch.nn.functional.linear(x.to(dtype), weight, bias)


def make_layers() -> dict[str, list[Layer]]:
    """Each contestant's layers, all of the same fp16 weights."""
    layers: dict[str, list[Layer]] = defaultdict(list)
    for _ in range(N_LAYERS):
        weight, bias = (torch.randn(SIZE, SIZE) * 0.02).half(), torch.randn(SIZE).half()
        layers["torch float32"].append(make_torch(weight, bias, torch.float32))
        layers["torch bfloat16"].append(make_torch(weight, bias, torch.bfloat16))
        if importlib.util.find_spec("bitsandbytes"):
            layers["bitsandbytes int8"].append(make_theirs(weight, bias))
        for name, capacity in zip(OURS, (0, 8), strict=True):
            layers[name].append(make_ours(weight, bias, capacity))
    return layers


def make_x(n_tokens: int) -> torch.Tensor:
    """fp16: what bitsandbytes computes in. Outliers in the outlier columns and nowhere else."""
    x = torch.randn(n_tokens, SIZE).clamp(-5, 5)
    x[:, OUTLIER_COLUMNS] *= 20
    return x.half()


def time_turns(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of calls in turn, of as many as fit the time, at least one of each."""
    times: list[float] = []
    while len(times) < len(calls) or sum(times) < CALL_SECONDS:
        times.append(time_call(calls[len(times) % len(calls)]))
    return statistics.median(times)


def measure_layers(layers: dict[str, list[Layer]], xs: list[torch.Tensor], limits: Limits, results: Results) -> None:
    for n_threads in N_THREADS:
        torch.set_num_threads(n_threads)
        read_gb_s, multiply_per_s = limits.read_gb_s(n_threads), limits.multiply_per_s(n_threads)
        results[f"read GB/s, {n_threads}"].append(read_gb_s)
        results[f"multiply /s, {n_threads}"].append(multiply_per_s)
        for x in xs:
            for name, copies in layers.items():
                results[f"{name}, {len(x)}, {n_threads}"].append(time_turns([partial(layer, x) for layer in copies]))
            floor = max(SIZE * SIZE / 1e9 / read_gb_s, len(x) * SIZE * SIZE / multiply_per_s)
            results[f"floor, {len(x)}, {n_threads}"].append(floor)


def measure_rows(limits: Limits, results: Results) -> None:
    """GB/s in, of a matrix of 4,096 x 4,096 in memory; and of as many rows in blocks that stay in each core's cache."""
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    sources: dict[str, npt.NDArray[Any]] = {
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.int16),
        "F32": values,
    }
    codes, absmax = np.ones((SIZE, SIZE), np.int8), np.empty(SIZE, np.float32)
    signal, noise = np.empty(SIZE), np.empty(SIZE)
    for dtype, source in sources.items():
        bits = source.view(cpu.BITS_DTYPE[dtype])

        def quantize(begin: int, end: int, bits: np.ndarray = bits) -> None:
            rows = slice(begin, end)
            cpu.row_quantize(bits[rows], codes[rows], absmax[rows], signal[rows], noise[rows])

        def quantize_blocks(begin: int, end: int, quantize: Callable[[int, int], None] = quantize) -> None:
            for _ in range(begin, end, N_BLOCK_ROWS):
                quantize(begin, begin + N_BLOCK_ROWS)

        quantize(0, 1)
        for n_threads in N_THREADS:
            for name, work in (("rows", quantize), ("blocks", quantize_blocks)):
                seconds = time_turns([partial(run_split, work, SIZE, n_threads)])
                results[f"{name} {dtype}, {n_threads}"].append(bits.nbytes / 1e9 / seconds)
            copy = partial(limits.copy_gb_s, bits.nbytes, n_threads)
            results[f"copy {dtype}, {n_threads}"].append(statistics.median(copy() for _ in range(9)))


def build_rows_table(results: Results) -> Table:
    table = Table("dtype", title="row_quantize of 4096 x 4096, GB/s in: median (range)")
    for heading in ("in memory", "in cache", "memcpy"):
        for column in (f"{heading}, 1", "2 threads", "2 / 1"):
            table.add_column(column, justify="right")
    for dtype in ("F16", "BF16", "F32"):
        row = [dtype]
        for what in ("rows", "blocks", "copy"):
            one, two = (results[f"{what} {dtype}, {n}"] for n in N_THREADS)
            row += [
                format_range(one, 1),
                format_range(two, 1),
                f"{statistics.median(two) / statistics.median(one):.2f}",
            ]
        table.add_row(*row)
    return table


def build_layers_table(results: Results, names: list[str], n_threads: int) -> Table:
    """Milliseconds of a call, and how many times as long as ours with stored columns alone."""
    limits = (
        f"memory read at {statistics.median(results[f'read GB/s, {n_threads}']):.0f} GB/s, "
        f"{statistics.median(results[f'multiply /s, {n_threads}']) / 1e9:.0f}e9 int8 products/s at most"
    )
    table = Table("who", title=f"Linear 4096 x 4096, ms, threads: {n_threads}; {limits}")
    for n_tokens in N_TOKENS:
        table.add_column(f"M = {n_tokens}", justify="right")
        table.add_column("/ ours", justify="right")
    for name in [*names, "floor"]:
        row = [name]
        for n_tokens in N_TOKENS:
            times, ours = (results[f"{who}, {n_tokens}, {n_threads}"] for who in (name, OURS[0]))
            row.append(format_range([1e3 * t for t in times], 2))
            row.append(f"{statistics.median(times) / statistics.median(ours):.2f}")
        table.add_row(*row)
    return table


def describe_software() -> dict[str, str]:
    names = ("torch", "numba", "llvmlite", "numpy", "bitsandbytes")
    installed = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return installed | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the CPU kernels with other libraries on this machine.")
    parser.add_argument("--rounds", type=parse_count, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number and the machine here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # bitsandbytes' about its own casts
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    limits, layers, xs = Limits(), make_layers(), [make_x(n) for n in N_TOKENS]
    results: Results = defaultdict(list)
    with torch.inference_mode():
        for x in xs:
            for copies in layers.values():
                copies[0](x)  # compiles, once
        busy_s, own_s, start = read_busy_s(), time.process_time(), time.perf_counter()
        for _ in range(options.rounds):
            measure_rows(limits, results)
            measure_layers(layers, xs, limits, results)
    wall_s, own_s, busy_s = (
        now - then
        for now, then in zip(
            (time.perf_counter(), time.process_time(), read_busy_s()), (start, own_s, busy_s), strict=True
        )
    )
    other_share = max(0.0, busy_s - own_s) / (wall_s * len(os.sched_getaffinity(0)))
    console = Console(width=140)
    console.print(build_rows_table(results))
    for n_threads in N_THREADS:
        console.print(build_layers_table(results, list(layers), n_threads))
    if other_share > DISTURBED_SHARE:
        console.print(f"not clean: other work took {other_share:.0%} of this machine's cores", style="bold")
    if options.json:
        facts = {"machine": describe_machine(Path()), "software": describe_software(), "other_cpu_share": other_share}
        report = {"schema": 1, "benchmark": "kernels-cpu", "rounds": options.rounds, **facts, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
