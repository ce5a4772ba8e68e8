"""Layers: one Linear in each form that runs here, on the same input, in turns.

All forms of a shape are alive at once and timed in rounds A B C A B C ..., of which the median counts: a slow drift of
the machine meets all. Each form has several copies of its layer and goes through them in turn, so that weights come
from memory, as in a model, and not from a cache. They are random; the time of a layer depends on its outlier columns
alone, which are made.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

N_ROUNDS = 7
MIN_SECONDS = 0.05  # of each timing: short calls are repeated until it is filled
MIN_CALLS = 4
CPU_SHAPES = [(4096, 4096)]
PAPER_SIZES = (768, 1024, 1536, 2048, 2560, 4096, 5140, 12288)  # Table 5: the first product of the FFN
OPT_66B = [(9216, 9216), (9216, 36864), (36864, 9216)]
GPU_SHAPES = [*((size, 4 * size) for size in PAPER_SIZES), *OPT_66B]
CPU_TOKENS = (1, 16, 256)
GPU_TOKENS = (1, 4, 16, 64, 512, 2048, 8192)
OUTLIERS = (0, 6, 40)
CACHE_BYTES = 64 << 20  # more than the caches of the machines at hand hold


@dataclass(frozen=True)
class LayerTime:
    """Median seconds of one product in one form."""

    form: str
    n_in: int
    n_out: int
    n_tokens: int
    n_outliers: int
    n_threads: int
    seconds: float


def make_input(n_tokens: int, n_in: int, columns: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal activations; the outlier columns reach twenty."""
    x = torch.randn(n_tokens, n_in).clamp(-5, 5)
    x[:, columns] = 20.0
    return x.to(device, dtype)


def layer_forms(
    n_in: int, n_out: int, columns: torch.Tensor, device: str
) -> Iterator[tuple[str, torch.dtype, nn.Module]]:
    """Name, dtype of the input, and the layer; forms that are not installed or do not run here are left out."""
    from int8convert.runtime.linear import Int8Linear
    from int8convert.runtime.modes import OutlierMode

    weight = torch.randn(n_out, n_in, device=device) * 0.02
    for dtype in (torch.float16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        linear = nn.Linear(n_in, n_out, bias=False, device="meta").to_empty(device=device).to(dtype)
        linear.weight.data = weight.to(dtype)
        yield str(dtype).removeprefix("torch."), dtype, linear
    own = torch.float16 if device == "cuda" else torch.float32
    if (theirs := bitsandbytes_layer(weight)) is not None:
        yield "bitsandbytes", torch.float16, theirs
    for mode in (OutlierMode.DYNAMIC, OutlierMode.STATIC_GUARD, OutlierMode.STATIC):
        layer = Int8Linear.from_float(weight.to(own), mode=mode)
        if mode.uses_stored:
            layer.set_outliers(columns, weight[:, columns].to(own))
        yield f"int8convert {mode}", own, layer


def bitsandbytes_layer(weight: torch.Tensor) -> nn.Module | None:
    try:
        import bitsandbytes
    except ImportError:
        return None
    n_out, n_in = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(n_in, n_out, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device).eval()  # in training it multiplies by the dequantized weight


def in_turn(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], object]:
    """A call of the next of the layers."""
    turns = itertools.cycle(layers)
    return lambda: next(turns)(x)


def time_calls(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median seconds of each call over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        for _ in range(MIN_CALLS):
            call()
        repeats[name] = max(MIN_CALLS, round(MIN_SECONDS / max(1e-7, time_once(call, 1, device))))
    for _ in range(N_ROUNDS):
        for name, call in calls.items():
            seconds[name].append(time_once(call, repeats[name], device))
    return {name: statistics.median(times) for name, times in seconds.items()}


def time_once(call: Callable[[], object], repeats: int, device: str) -> float:
    if device != "cuda":
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - began) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


@torch.no_grad()
def bench_layers(device: str, threads: list[int], notes: Console) -> list[LayerTime]:
    found = []
    shapes, tokens = (GPU_SHAPES, GPU_TOKENS) if device == "cuda" else (CPU_SHAPES, CPU_TOKENS)
    for n_in, n_out in shapes:
        for n_outliers in OUTLIERS:
            columns = torch.randperm(n_in)[:n_outliers].sort().values
            n_copies = math.ceil(CACHE_BYTES / (n_in * n_out))
            copies = [list(layer_forms(n_in, n_out, columns, device)) for _ in range(n_copies)]
            forms = {form[0][0]: (form[0][1], [layer for _, _, layer in form]) for form in zip(*copies, strict=True)}
            for n_tokens in tokens:
                inputs = {
                    d: make_input(n_tokens, n_in, columns, d, device) for d in {dtype for dtype, _ in forms.values()}
                }
                calls = {name: in_turn(layers, inputs[dtype]) for name, (dtype, layers) in forms.items()}
                for n_threads in threads:
                    torch.set_num_threads(n_threads)
                    for name, seconds in time_calls(calls, device).items():
                        found.append(LayerTime(name, n_in, n_out, n_tokens, n_outliers, n_threads, seconds))
                    notes.print(f"{n_in} -> {n_out}, {n_tokens} tokens, {n_outliers} outliers, {n_threads} threads")
    return found


def print_layers(times: list[LayerTime], out: Console) -> None:
    forms = list(dict.fromkeys(t.form for t in times))
    table = Table(title="Seconds of one product, in ms; in brackets bitsandbytes' time over it", box=None)
    for column in ("in -> out", "tokens", "outliers", "threads", *forms):
        table.add_column(column, justify="right")
    cells: dict[tuple[int, int, int, int, int], dict[str, float]] = {}
    for t in times:
        cells.setdefault((t.n_in, t.n_out, t.n_tokens, t.n_outliers, t.n_threads), {})[t.form] = t.seconds
    for (n_in, n_out, *key), row in cells.items():
        base = row.get("bitsandbytes")
        shown = [
            f"{1e3 * row[f]:.3g}" + (f" ({base / row[f]:.2f}x)" if base and f != "bitsandbytes" else "") for f in forms
        ]
        table.add_row(f"{n_in} -> {n_out}", *map(str, key), *shown)
    out.print(table)
