#!/usr/bin/env python3
"""Time every CUDA kernel on this GPU beside its roofline, torch's float16 product and the library's int8 product.

How it goes:
1. The ceilings are measured first: a large copy, and a large float16 and int8 product of the library's.
2. Each case has enough copies of its weights to go past the L2 cache, and goes through them within one CUDA graph, so
   that neither the cache nor Python's launches are measured. The median of the replays counts.
3. The roofline of a case is the longer of two times: its bytes at the copy's rate, its products at the best rate seen.
4. Variants of the kernels that are cut otherwise are timed too; the best is named.

A case that fails reports itself; the rest goes on. Left out on purpose: results, which the tests compare.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cuda_kernels import ops
from cuda_kernels.reference import QuantizedWeight

Call = Callable[[], Any]
CACHE_BYTES = 200_000_000  # several times the L2 of an H200
N_REPLAYS = 15
OPT_66B = [(9216, 9216), (9216, 36864), (36864, 9216)]  # in, out
N_OUTLIERS = 6


def time_graph(calls: list[Call], budget_s: float = 0.3) -> float:
    """Median seconds of one call, of a CUDA graph that makes them all once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < N_REPLAYS and time.perf_counter() - began < budget_s):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copies(n_bytes: int) -> int:
    return min(64, max(2, -(-CACHE_BYTES // n_bytes)))


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of the library's products."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * source.numel() / time_graph([lambda: target.copy_(source)])}
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    found["float16_flops_per_s"] = 2 * 8192**3 / time_graph([lambda: a @ b])
    a8, b8 = (torch.randint(-127, 127, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    found["int8_ops_per_s"] = 2 * 8192**3 / time_graph([lambda: torch._int_mm(a8, b8.t())])
    return found


def bench_row_quantize(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    for dtype, item in ((torch.float16, 2), (torch.bfloat16, 2), (torch.float32, 4)):
        for n_rows, n_columns in ((9216, 9216), (9216, 36864), (32768, 1024), (2048, 131072)):
            weights = [torch.randn(n_rows, n_columns, device="cuda").to(dtype) for _ in range(2)]
            seconds = time_graph([lambda w=w: ops.row_quantize(w) for w in weights])
            n_bytes = n_rows * n_columns * (item + 1) + 12 * n_rows
            yield {
                "kernel": "row_quantize",
                "case": f"{dtype} {n_rows}x{n_columns}".removeprefix("torch."),
                "seconds": seconds,
                "roofline_s": n_bytes / ceilings["copy_bytes_per_s"],
                "bytes_per_s": n_bytes / seconds,
            }


class Layer:
    """One product's operands, several times over."""

    def __init__(self, n_in: int, n_out: int, n_tokens: int, n_outliers: int) -> None:
        self.n_in, self.n_out, self.n_tokens = n_in, n_out, n_tokens
        self.columns = torch.randperm(n_in, device="cuda")[:n_outliers].sort().values.to(torch.int32)
        weights = [
            torch.randn(n_out, n_in, device="cuda", dtype=torch.float16) * 0.02 for _ in range(copies(n_in * n_out))
        ]
        self.bias = torch.randn(n_out, device="cuda", dtype=torch.float16)
        self.int8 = [
            QuantizedWeight(*ops.row_quantize(weight)[:2], weight[:, self.columns.long()].contiguous(), self.bias)
            for weight in weights
        ]
        self.floats = weights[: copies(2 * n_in * n_out)]
        self.x = torch.randn(n_tokens, n_in, device="cuda").clamp(-5, 5)
        self.x[:, self.columns.long()] = 20.0
        self.x = self.x.half()

    def linear_calls(self, capacity: int) -> list[Call]:
        return [lambda w=w: ops.int8_linear(self.x, w, self.columns, 6.0, capacity) for w in self.int8]

    def product_calls(self) -> list[Call]:
        quantized = ops.activation_quantize(self.x, self.columns, 6.0, 0)
        return [lambda w=w: ops.int8_matmul(quantized, w) for w in self.int8]

    def float_calls(self) -> list[Call]:
        return [lambda w=w: functional.linear(self.x, w, self.bias) for w in self.floats]

    def library_calls(self) -> list[Call]:
        """The library's int8 product alone, tokens padded to what it takes: no scales, no outliers, no bias."""
        codes = torch.randint(-127, 127, (max(32, self.n_tokens), self.n_in), device="cuda", dtype=torch.int8)
        return [lambda w=w: torch._int_mm(codes, w.codes.t()) for w in self.int8]

    def roofline_s(self, ceilings: dict[str, float], item_bytes: int) -> float:
        n_bytes = self.n_in * self.n_out * item_bytes + 2 * self.n_tokens * (self.n_in + self.n_out)
        rate = ceilings["int8_ops_per_s" if item_bytes == 1 else "float16_flops_per_s"]
        return max(n_bytes / ceilings["copy_bytes_per_s"], 2 * self.n_in * self.n_out * self.n_tokens / rate)


def bench_products(
    ceilings: dict[str, float], shapes: list[tuple[int, int]], tokens: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    for n_in, n_out in shapes:
        for n_tokens in tokens:
            layer = Layer(n_in, n_out, n_tokens, N_OUTLIERS)
            seconds = {
                "product": time_graph(layer.product_calls()),
                "linear_static": time_graph(layer.linear_calls(0)),
                "linear_guard": time_graph(layer.linear_calls(64)),
                "float16": time_graph(layer.float_calls()),
                "library_int8": time_graph(layer.library_calls()),
            }
            yield {
                "kernel": "int8_matmul",
                "case": f"{n_in}->{n_out} M={n_tokens}",
                **{f"{name}_s": value for name, value in seconds.items()},
                "seconds": seconds["linear_static"],
                "roofline_s": layer.roofline_s(ceilings, 1),
                "weight_bytes_per_s": n_in * n_out / seconds["product"],
                "speedup_over_float16": seconds["float16"] / seconds["linear_static"],
            }
            torch.cuda.empty_cache()


def bench_activation_quantize(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    for n_columns in (4096, 9216, 36864):
        for n_tokens in (1, 16, 512, 8192):
            x = (torch.randn(n_tokens, n_columns, device="cuda") * 1.2).clamp(-5, 5).half()
            columns = torch.arange(0, 60, 10, device="cuda", dtype=torch.int32)
            n_bytes = 3 * n_tokens * n_columns
            for mode, stored, capacity in (
                ("static", columns, 0),
                ("guard", columns, 64),
                ("dynamic", columns[:0], 64),
            ):
                call = partial(ops.activation_quantize, x, stored, 6.0, capacity)
                yield {
                    "kernel": "activation_quantize",
                    "case": f"{mode} {n_tokens}x{n_columns}",
                    "seconds": time_graph([call] * 8),
                    "roofline_s": n_bytes / ceilings["copy_bytes_per_s"],
                }


def bench_variants(ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The kernels for few tokens cut in other ways, by their planning functions' own parameters."""
    from cuda_kernels.cuda import int8_gemv, int8_skinny

    for module, tokens in ((int8_gemv, (1, 4, 8)), (int8_skinny, (16, 64))):
        for n_in, n_out in ((9216, 9216), (9216, 36864)):
            for n_tokens in tokens:
                layer = Layer(n_in, n_out, n_tokens, N_OUTLIERS)
                yield {
                    "kernel": module.__name__.removeprefix("cuda_kernels."),
                    "case": f"{n_in}->{n_out} M={n_tokens} best cut",
                    "roofline_s": layer.roofline_s(ceilings, 1),
                    **best_cut(module, layer),
                }


def best_cut(module: Any, layer: Layer) -> dict[str, Any]:
    """Seconds of the default plan, and of the fastest of its neighbours."""
    from cuda_kernels.cuda import int8_operands
    from cuda_kernels.cuda.launch import run

    x = ops.activation_quantize(layer.x, layer.columns, 6.0, 0)
    y = torch.empty(layer.n_tokens, layer.n_out, device="cuda", dtype=torch.float16)
    planned = [int8_operands.of_tensors(x, weight, y) for weight in layer.int8]
    default = module.plan(layer.n_tokens, layer.n_out, layer.n_in)
    seconds = {}
    for cut in dict.fromkeys((default, *variants_of(default))):
        try:
            seconds[cut] = time_graph([partial(run, module.launches(o, cut), y.device) for o in planned], 0.1)
        except Exception as error:  # a cut the kernel does not take
            print(f"{module.__name__} {cut}: {error}", file=sys.stderr)
    best = min(seconds, key=lambda cut: seconds[cut])
    return {"seconds": seconds[best], "cut": best._asdict(), "default_s": seconds.get(default)}


def variants_of(cut: Any) -> Iterator[Any]:
    """The same with one number halved or doubled."""
    for name, value in cut._asdict().items():
        if name == "tokens":
            continue
        for other in (value // 2, value * 2):
            if other >= 1:
                yield cut._replace(**{name: other})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this many")
    chosen = parser.parse_args()
    began = time.perf_counter()
    ceilings = measure_ceilings()
    print({name: f"{value / 1e12:.2f} T/s" for name, value in ceilings.items()})
    result: dict[str, Any] = {"schema": 1, "gpu": torch.cuda.get_device_name(), "ceilings": ceilings, "cases": []}
    benches: list[Iterator[dict[str, Any]]] = [
        bench_row_quantize(ceilings),
        bench_products(ceilings, OPT_66B, (1, 4, 8, 16, 64)),
        bench_products(ceilings, OPT_66B, (512, 2048)),
        bench_activation_quantize(ceilings),
        bench_variants(ceilings),
    ]
    for bench in benches:
        try:
            for case in bench:
                result["cases"].append(case)
                share = case["roofline_s"] / case["seconds"]
                extra = f", {case['speedup_over_float16']:.2f}x float16" if "speedup_over_float16" in case else ""
                us = 1e6 * case["seconds"]
                print(f"{case['kernel']:20} {case['case']:32} {us:9.1f} us, {share:5.0%} of roofline{extra}")
                if chosen.json:
                    chosen.json.write_text(json.dumps(result, indent=1) + "\n")
                if time.perf_counter() - began > chosen.seconds:
                    print("out of time: the rest was not measured")
                    return
        except Exception:
            result.setdefault("failed", []).append(traceback.format_exc())
            traceback.print_exc()
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
