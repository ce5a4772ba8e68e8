#!/usr/bin/env python3
"""Generation: a model of OPT's shape with random weights in each form, each in a process of its own.

Seconds to the first token after a prompt, tokens a second after it, peak memory. Run as a program, this is one form, in
the child; what it measured comes as one JSON object on stdout.
"""

import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

N_PROMPT, N_NEW = 64, 16


@dataclass(frozen=True)
class GenerationTime:
    """One model's generation in one form."""

    form: str
    n_threads: int
    load_s: float
    first_token_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int


def run_generation(form: str, folder: Path, device: str, n_threads: int) -> GenerationTime:
    """Generate in this process, and measure."""
    import transformers

    from int8convert.runtime.load import load

    torch.set_num_threads(n_threads)
    began = time.perf_counter()
    if form == "int8convert":
        model = load(folder, device_map={"": device})
    elif form == "bitsandbytes":
        model = transformers.OPTForCausalLM.from_pretrained(folder, device_map={"": device})
    else:
        model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, form), device_map={"": device})
    load_s = time.perf_counter() - began
    prompt = torch.randint(10, 50_000, (1, N_PROMPT), generator=torch.Generator().manual_seed(0)).to(device)

    def generate(n: int) -> float:
        started = time.perf_counter()
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=1)
        return time.perf_counter() - started

    generate(2)
    first = min(generate(1) for _ in range(2))
    whole = min(generate(1 + N_NEW) for _ in range(2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak
    return GenerationTime(form, n_threads, load_s, first, N_NEW / (whole - first), peak)


def bench_generation(shape: str, device: str, threads: list[int], work: Path, notes: Console) -> list[GenerationTime]:
    """Each form in a process of its own, so that its peak memory is its own."""
    source, converted = work / shape, work / f"{shape}-int8"
    here = Path(__file__).resolve()
    if not (source / "model.safetensors.index.json").exists():
        subprocess.run([sys.executable, str(here.with_name("make_checkpoint.py")), shape, str(source)], check=True)
    if not (converted / "config.json").exists():
        quantize = [sys.executable, "-m", "int8convert", "quantize", str(source), str(converted)]
        subprocess.run([*quantize, "--overwrite", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    floats = ("float16",) if device == "cuda" else ("float32", "bfloat16")
    found = []
    for n_threads in threads:
        for form in (*floats, "bitsandbytes", "int8convert"):
            folder = source if form in floats else converted
            command = [sys.executable, str(here), form, str(folder), device, str(n_threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                notes.print(f"{form} does not run here: {(done.stderr.splitlines() or ['?'])[-1]}", markup=False)
                continue
            found.append(GenerationTime(**json.loads(done.stdout.splitlines()[-1])))
            notes.print(f"{form}, {n_threads} threads: {found[-1].decode_tokens_per_s:.2f} tokens/s")
    return found


def print_generation(times: list[GenerationTime], shape: str, out: Console) -> None:
    title = f"{shape}: {N_PROMPT} tokens in, {N_NEW} after the first out, batch 1"
    table = Table(title=title, box=None)
    for column in ("form", "threads", "load s", "first token s", "tokens/s", "peak GB"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for t in times:
        numbers = (f"{t.load_s:.1f}", f"{t.first_token_s:.3f}", f"{t.decode_tokens_per_s:.2f}")
        table.add_row(t.form, str(t.n_threads), *numbers, f"{t.peak_memory_bytes / 1e9:.2f}")
    out.print(table)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    form, folder, device, n_threads = sys.argv[1:]
    print(json.dumps(asdict(run_generation(form, Path(folder), device, int(n_threads)))))
