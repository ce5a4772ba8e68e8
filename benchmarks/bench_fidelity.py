"""How near each int8 arithmetic comes to a really trained model, all on the same tokens.

How it goes:
1. The model is converted, and outlier columns are chosen by one half of the text and stored.
2. `verify`'s own measurement runs the other half through source and int8 model: weights alone; one scale a token, as a
   server computes the compressed-tensors form; LLM.int8(); stored columns; a scale for each block of 128 inputs.
3. The same with a rotation or smoothing folded into the weights, with rounding by a calibration, with some weights in
   16 bits, and with the other inputs rotated while the model runs.
4. Beside them: the Q8_0 arithmetic of llama.cpp, simulated in float32, for weights alone and for both operands; and the
   bitsandbytes form in transformers, run by bitsandbytes.

    ./benchmarks/bench_fidelity MODEL [MODEL ...] --write docs/results/fidelity.md

`scripts/real_models` makes models for this. The text is the help of the Python interpreter (`pydoc_data.topics`), which
is technical English, unless --text names another.

Rare tokens dominate a mean: medians, 99th percentiles and intervals over windows stand beside it. Two rows on the same
tokens differ by less than their intervals say, because the windows are the same.

Takes some 40 minutes on two cores for 0.5B parameters and 16 windows, and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pydoc_data.topics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import int8convert
from int8convert.outliers.keep import keep_budget
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.models import load_model, open_tokenizer
from int8convert.runtime.text.texts import Text
from int8convert.runtime.text.windows import TokenWindows, read_windows
from int8convert.verification.fidelity.level import measure_fidelity
from int8convert.verification.fidelity.paired_statistics import PairedStatistics, PairedSummary
from int8convert.verification.options import Execution

MODES = {
    "weight-only": "int8 weights, inputs as they are",
    "none": "one scale a token: the compressed-tensors form in a server",
    "dynamic": "LLM.int8(), the default",
    "blocks": "a scale for each 128 inputs",
    "dynamic+blocks": "LLM.int8() with a scale for each 128 inputs",
}
STORED_MODES = {
    "static+guard": "stored columns, the default where some are stored",
    "static+blocks": "stored columns, and a scale for each 128 inputs",
}
BLOCK = 32
"""Values that share a scale in Q8_0."""

Rows = list[tuple[str, float, PairedSummary]]
"""What, its bytes relative to those of the int8 weights, its statistics."""

console = Console(stderr=True)


def as_q8_0(values: torch.Tensor) -> torch.Tensor:
    """Return the values that Q8_0 keeps of float32 values, in blocks of 32 along the last dimension.

    As `quantize_row_q8_0_ref` of llama.cpp: d = max |x| / 127, codes = round(x / d) with ties away from zero, d stored
    in fp16.
    """
    blocks = values.unflatten(-1, (-1, BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    steps = blocks * torch.where(d > 0, 1 / d, 0)
    codes = torch.copysign((steps.abs() + 0.5).floor(), steps)
    return (codes * d.half().float()).flatten(-2)


@contextmanager
def running_q8_0(model: nn.Module, with_inputs: bool) -> Iterator[None]:
    """Run the layers that become int8 with Q8_0 weights, and Q8_0 inputs if asked for, until the context ends."""
    layers = [model.get_submodule(name) for name in modules_to_replace(model)]
    kept = [layer.weight.data for layer in layers]
    for layer in layers:
        if not isinstance(layer, nn.Linear) or layer.in_features % BLOCK:
            raise SystemExit(f"bench_fidelity: Q8_0 has no form for {layer}")
        layer.weight.data = as_q8_0(layer.weight.data)
    hooks = [layer.register_forward_pre_hook(lambda _, x: (as_q8_0(x[0]),)) for layer in layers if with_inputs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


@torch.no_grad()
def compare(reference: Any, run: Callable[[torch.Tensor], torch.Tensor], windows: TokenWindows) -> PairedSummary:
    """Compare the logits [positions, vocabulary] of `run` with those of a model."""
    statistics = PairedStatistics()
    for i, ids in enumerate(windows.ids):
        scored = slice(windows.scored_from(i) - 1, -1)
        exact = reference(ids[None], use_cache=False).logits[0]
        statistics.add(run(ids)[scored], exact[scored], ids[scored.start + 1 :])
    return statistics.summarize()


def q8_0_rows(source: Path, windows: TokenWindows) -> Rows:
    model, rows = load_model(source, "cpu"), Rows()
    for with_inputs, what in ((False, "Q8_0 weights, inputs as they are"), (True, "**Q8_0 x Q8_0, as llama.cpp**")):

        def run(ids: torch.Tensor, with_inputs: bool = with_inputs) -> torch.Tensor:
            with running_q8_0(model, with_inputs):
                logits: torch.Tensor = model(ids[None], use_cache=False).logits[0]
            return logits

        rows.append((what, 1 + 2 / BLOCK, compare(model, run, windows)))
        console.print(what)
    return rows


def bitsandbytes_row(source: Path, out: Path, windows: TokenWindows, prefix: str = "") -> Rows:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, device_map="cpu").eval()
    summary = compare(load_model(source, "cpu"), lambda ids: theirs(ids[None], use_cache=False).logits[0], windows)
    return [(f"{prefix}the bitsandbytes form, run by bitsandbytes", 1.0, summary)]


def our_rows(
    source: Path, out: Path, windows: TokenWindows, modes: dict[str, str], share: float, prefix: str = ""
) -> Rows:
    reports = measure_fidelity(source, out, windows, Execution("cpu", False, tuple(modes)))
    for report in reports:
        console.print(f"{prefix}{report.mode}: {report.mean_kl:.5f}")
    return [(f"{prefix}{modes[report.mode]} (`{report.mode}`)", share, report) for report in reports]


@dataclass(frozen=True)
class Form:
    """One way to convert, and what is measured of it.

    Attributes:
        prefix: what its rows begin with.
        modes: arithmetics of our runtime.
        keeps: percent of the weights that stay in 16 bits.
        runs_theirs: whether bitsandbytes runs it, too.
    """

    prefix: str
    options: int8convert.PlanOptions
    modes: tuple[str, ...]
    keeps: float = 0.0
    runs_theirs: bool = False


def forms(calibration: Path) -> Iterator[Form]:
    """Yield the forms beside the plain one."""
    plain = int8convert.PlanOptions()
    rounded = replace(plain, round="calibrated", calibration=calibration)
    smoothed = replace(rounded, smooth="calibrated")
    yield Form("rotated: ", replace(plain, rotate=True), ("none", "dynamic", "blocks"), runs_theirs=True)
    yield Form("smoothed, calibrated: ", smoothed, ("weight-only", "dynamic"), runs_theirs=True)
    yield Form("smoothed, calibrated, 8 % of the weights kept: ", smoothed, ("dynamic",), keeps=8, runs_theirs=True)
    inputs = replace(rounded, rotate_inputs=True, format="compressed-tensors")
    yield Form("all inputs rotated, calibrated: ", inputs, ("weight-only", "none", "blocks"))
    yield Form("all inputs rotated, calibrated, 3 % of the weights kept: ", inputs, ("blocks",), keeps=3)
    folded = replace(smoothed, rotate=True)
    yield Form("rotated, smoothed, calibrated: ", folded, ("none", "dynamic", "blocks"), runs_theirs=True)
    for_servers = replace(folded, format="compressed-tensors")
    yield Form("rotated, smoothed, calibrated, 5 % of the weights kept: ", for_servers, ("none",), keeps=5)


def measure(source: Path, text: Path, calibrating: Path, args: argparse.Namespace, folder: Path) -> Rows:
    """Convert a model in each way, and measure every arithmetic."""
    out, calibration = folder / "int8", folder / "calibration"
    n_sequences, length = args.sequences, args.length
    int8convert.quantize(source, out)
    with open_tokenizer(source, False) as tokenizer:
        windows = read_windows(text, tokenizer, n_sequences, length)
    rows = our_rows(source, out, windows, MODES, 1.0)
    rows += bitsandbytes_row(source, out, windows)
    found = int8convert.find_outliers(source, Text(calibrating, n_sequences=n_sequences, length=length), device="cpu")
    int8convert.store_outliers(source, out, found.static_set)
    share = 1 + found.static_set_bytes / found.int8_bytes
    rows += our_rows(source, out, windows, STORED_MODES, share)
    if args.calibration is not None:
        calibration = args.calibration
    else:
        many = Text(calibrating, n_sequences=args.calibrated, length=length)
        int8convert.calibrate(source, calibration, many, with_moments=True, device="cpu")
    for i, form in enumerate(forms(calibration)):
        rows += form_rows(source, folder / f"form-{i}", windows, form, Text(calibrating, n_sequences=8, length=length))
    return rows + q8_0_rows(source, windows)


def form_rows(source: Path, out: Path, windows: TokenWindows, form: Form, text: Text) -> Rows:
    keep = keep_budget(form.keeps, text, device="cpu") if form.keeps else None
    report = int8convert.quantize(source, out, replace(form.options, keep=keep))
    n_kept = (report.kept_by_budget.n_weights or 0) if report.kept_by_budget else 0
    share = 1 + n_kept / (report.n_int8_parameters + n_kept)
    rows = our_rows(source, out, windows, {mode: MODES[mode] for mode in form.modes}, share, form.prefix)
    return rows + (bitsandbytes_row(source, out, windows, form.prefix) if form.runs_theirs else [])


def describe(name: str, rows: Rows) -> str:
    lines = [
        f"## {name}",
        "",
        f"{rows[0][2].n_sequences} windows, {rows[0][2].n_tokens:,} tokens, perplexity of the source "
        f"{rows[0][2].reference_perplexity:.2f}.",
        "",
        "| arithmetic | bytes | mean KL, 95 % | median KL | 99th percentile | same top token |",
        "|---|---|---|---|---|---|",
    ]
    for what, share, s in rows:
        low, high = s.mean_kl_interval
        lines.append(
            f"| {what} | {share:.3f} | {s.mean_kl:.5f} ({low:.5f} to {high:.5f}) | {s.median_kl:.5f} | {s.p99_kl:.4f} "
            f"| {100 * s.same_top1:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", type=Path, nargs="+", help="checkpoints that predict the next token, in 16 or 32 bits"
    )
    parser.add_argument("--text", type=Path, help="a text in UTF-8: its first half calibrates, its second half judges")
    parser.add_argument("--sequences", type=int, default=16, help="windows of each half (default: 16)")
    parser.add_argument("--calibrated", type=int, default=64, help="windows of the calibration (default: 64)")
    parser.add_argument("--calibration", type=Path, help="the folder of a calibration on the text's first half")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default: 256)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables as a page in Markdown, too")
    args = parser.parse_args()
    whole = args.text.read_text("utf-8") if args.text else "\n\n".join(pydoc_data.topics.topics.values())
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "bitsandbytes")
    )
    page = [
        "# Fidelity on really trained models",
        "",
        f"Written by `benchmarks/bench_fidelity` on a CPU ({versions}).",
        "KL divergence to the source in float32, in nats a token. Bytes are relative to those of the int8 codes.",
    ]
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            text, calibration = Path(folder, "text.txt"), Path(folder, "calibration.txt")
            calibration.write_text(whole[: len(whole) // 2], "utf-8")
            text.write_text(whole[len(whole) // 2 :], "utf-8")
            rows = measure(model, text, calibration, args, Path(folder))
        page += ["", describe(model.name, rows)]
        console.print(page[-1])
    print("\n".join(page))
    if args.write:
        args.write.write_text("\n".join(page) + "\n", "utf-8")


if __name__ == "__main__":
    main()
