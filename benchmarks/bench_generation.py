#!/usr/bin/env python3
"""Generation: one checkpoint in each form, each in a process of its own, in turns on this machine.

1. Each form is made of the checkpoint once, unless it is there: int8 by int8convert, and CTranslate2's and llama.cpp's
   files.
2. Rounds A B C A B C ..., of which the median counts: a process opens a form, and generates from one prompt of 512
   tokens twice one token, of which the shorter time counts, and then 33. So the prompt's time and that of one token
   after another come apart, for all forms in the same way.
3. The tokens are compared with those of the first form, so that a wrong file does not win.

Run as a program, this is one form, in the child; what it measured comes as one JSON object on stdout.

Left out on purpose: sampling, batches, and texts, of which the prompt holds none.
"""

import json
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench_convert import format_range
from benchmarks.generation_peers import Generate, open_ctranslate2, open_llama_cpp, write_ctranslate2, write_llama_cpp

ROOT = Path(__file__).resolve().parents[1]
N_PROMPT, N_NEW = 512, 32
N_WARM_UP = 16
FLOATS = ("float32", "bfloat16", "float16")
PEERS: dict[str, Callable[[Path, Path], None]] = {"ctranslate2": write_ctranslate2, "llama.cpp": write_llama_cpp}
INT8_HEAD = "int8convert, int8 head"
"""As llama.cpp and CTranslate2 have it; the others keep the head in 16 bits."""

FORMS = ("float32", "bfloat16", "bitsandbytes", *PEERS, "int8convert", INT8_HEAD)
FORMS_GPU = ("float16", "bitsandbytes", "int8convert")


@dataclass(frozen=True)
class GenerationTime:
    """One run of one form.

    Attributes:
        prompt_s: seconds from the prompt to its first new token.
        tokens: the new tokens.
    """

    form: str
    n_threads: int
    load_s: float
    prompt_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    tokens: list[int]

    @property
    def prompt_tokens_per_s(self) -> float:
        return N_PROMPT / self.prompt_s


def open_with_transformers(form: str, folder: Path, device: str) -> Generate:
    """Load a float checkpoint, or an int8 one by bitsandbytes or by int8convert."""
    import transformers

    from int8convert.runtime.load import load

    if form in ("int8convert", INT8_HEAD):
        model = load(folder, device_map={"": device}, int8_head=form == INT8_HEAD)
    else:
        options = {"dtype": getattr(torch, form)} if form in FLOATS else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **options)

    def generate(prompt: list[int], n_new: int) -> list[int]:
        ids = torch.tensor([prompt], device=device)
        whole = model.generate(ids, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=1)
        found: list[int] = whole[0, len(prompt) :].tolist()
        return found

    return generate


def run_generation(form: str, folder: Path, device: str, n_threads: int) -> GenerationTime:
    """Generate in this process, and measure."""
    torch.set_num_threads(n_threads)
    began = time.perf_counter()
    if form == "ctranslate2":
        generate = open_ctranslate2(folder, n_threads)
    elif form == "llama.cpp":
        generate = open_llama_cpp(folder, n_threads)
    else:
        generate = open_with_transformers(form, folder, device)
    load_s = time.perf_counter() - began
    prompt = torch.randint(10, 1000, (N_PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    generate(prompt[:N_WARM_UP], 2)
    prompt_s = math.inf
    for _ in range(2):
        started = time.perf_counter()
        generate(prompt, 1)
        prompt_s = min(prompt_s, time.perf_counter() - started)
    started = time.perf_counter()
    tokens = generate(prompt, 1 + N_NEW)
    decode_s = time.perf_counter() - started - prompt_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak
    return GenerationTime(form, n_threads, load_s, prompt_s, N_NEW / decode_s, peak, tokens)


def child(arguments: list[str], peers: Path | None) -> subprocess.CompletedProcess[str]:
    """Run a module of this project in a process of its own."""
    path = os.pathsep.join([str(ROOT), *([str(peers)] if peers else [])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)


def last_line(text: str) -> str:
    return (text.splitlines() or ["?"])[-1]


def make_forms(source: Path, forms: list[str], work: Path, peers: Path | None, notes: Console) -> dict[str, Path]:
    """Return form -> its files; forms that cannot be made are left out."""
    found = {}
    for form in forms:
        name = source.name if form in FLOATS else f"{source.name}-{form if form in PEERS else 'int8'}"
        target = source if form in FLOATS else work / name
        if form in PEERS and not target.exists():
            done = child(["benchmarks.bench_generation", "make", form, str(source), str(target)], peers)
        elif form not in PEERS and not (target / "config.json").exists():
            done = child(["int8convert", "quantize", str(source), str(target), "--overwrite", "--quiet"], None)
        else:
            done = None
        if done is not None and done.returncode:
            notes.print(f"{form} cannot be made here: {last_line(done.stderr)}", markup=False)
            continue
        found[form] = target
    return found


def bench_generation(
    folders: dict[str, Path], device: str, threads: list[int], n_rounds: int, peers: Path | None, notes: Console
) -> list[GenerationTime]:
    """Return the runs of all forms, in turns; each in a process of its own, so that its peak memory is its own."""
    found = []
    for n_threads in threads:
        left = dict(folders)
        for _ in range(n_rounds):
            for form, folder in list(left.items()):
                done = child(["benchmarks.bench_generation", "run", form, str(folder), device, str(n_threads)], peers)
                if done.returncode:
                    notes.print(f"{form} does not run here: {last_line(done.stderr)}", markup=False)
                    del left[form]
                    continue
                run = GenerationTime(**json.loads(last_line(done.stdout)))
                found.append(run)
                rates = f"{run.prompt_tokens_per_s:.1f} and {run.decode_tokens_per_s:.2f} tokens/s"
                notes.print(f"{form}, {n_threads} threads: {rates}", markup=False)
    return found


def print_generation(runs: list[GenerationTime], name: str, out: Console) -> None:
    title = f"{name}: {N_PROMPT} tokens in, {N_NEW} after the first out, batch 1; medians (min-max) of the rounds"
    table = Table(title=title, box=None)
    for column in ("form", "threads", "load s", "prompt tokens/s", "then tokens/s", "peak GB", "same tokens"):
        table.add_column(column, justify="left" if column == "form" else "right")
    groups: dict[tuple[str, int], list[GenerationTime]] = {}
    for run in runs:
        groups.setdefault((run.form, run.n_threads), []).append(run)
    for (form, n_threads), mine in groups.items():
        pairs = enumerate(zip(mine[0].tokens, runs[0].tokens, strict=True))
        n_same = next((i for i, (token, other) in pairs if token != other), 1 + N_NEW)
        table.add_row(
            form,
            str(n_threads),
            f"{statistics.median(run.load_s for run in mine):.1f}",
            format_range([run.prompt_tokens_per_s for run in mine], 1),
            format_range([run.decode_tokens_per_s for run in mine], 2),
            f"{max(run.peak_memory_bytes for run in mine) / 1e9:.2f}",
            f"{n_same} of {1 + N_NEW}",
        )
    out.print(table)


def main() -> None:
    """Make or run one form. stdout belongs to the result: what libraries print goes to stderr."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    match sys.argv[1:]:
        case ["make", form, source, target]:
            PEERS[form](Path(source), Path(target))
        case ["run", form, folder, device, n_threads]:
            run = run_generation(form, Path(folder), device, int(n_threads))
            result.write(json.dumps(asdict(run)) + "\n")
            result.flush()


if __name__ == "__main__":
    main()
