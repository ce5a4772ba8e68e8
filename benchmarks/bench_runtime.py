"""Time int8 layers and int8 models beside torch's float ones and other int8 ones, in turns, on this machine.

How it goes:
1. Layers: one Linear of K = N = 4096 in each form, for several numbers of tokens and of outlier columns. All forms get
   the same input; rounds A B C A B C ..., of which the median counts, so that a slow drift of the machine meets all.
2. Generation: a checkpoint in each form, CTranslate2's and llama.cpp's among them (`generation_peers` names what they
   need), each in a process of its own: tokens a second of a prompt and one after another, peak memory.

Weights of layers are random, and those of the model unless `--checkpoint` names one. The time of a layer does not
depend on them, but for the outlier columns, which are made.

On a GPU, layers are timed by events, float16 is the base, and shapes are those of the paper's Table 5 and of OPT-66B.

Left out on purpose: quality (`int8convert verify`), and conversion (`bench_convert`).
"""

import argparse
import json
import logging
import platform
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bench_generation import FORMS, FORMS_GPU, bench_generation, make_forms, print_generation
from benchmarks.bench_layers import bench_layers, print_layers
from benchmarks.bench_rounds import ensure_checkpoint


def describe_machine(device: str) -> dict[str, object]:
    """What a reader needs to place the numbers; no names, no paths."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].split(":", 1)[1].strip() if cpus else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(cpus),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=("layers", "generation"))
    parser.add_argument("--shape", default="opt-1.3b", help="of the model that generates; see make_checkpoint.py")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a 16-bit checkpoint, in place of --shape")
    parser.add_argument(
        "--forms", nargs="+", choices=(*FORMS, "float16"), metavar="FORM", help=f"of {', '.join(FORMS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of generation")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="where pip put CTranslate2 and llama.cpp")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parents[1] / ".cache" / "bench")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    notes, out = (
        Console(stderr=True, highlight=False),
        Console(highlight=False, width=None if sys.stdout.isatty() else 200),
    )
    torch.manual_seed(0)
    threads = chosen.threads if chosen.device == "cpu" else [torch.get_num_threads()]
    machine = describe_machine(chosen.device)
    result: dict[str, object] = {"schema": 1, "machine": machine}
    if chosen.only != "generation":
        layers = bench_layers(chosen.device, threads, notes)
        print_layers(layers, out)
        result["layers"] = [asdict(t) for t in layers]
    if chosen.only != "layers":
        chosen.work.mkdir(parents=True, exist_ok=True)
        source = (chosen.checkpoint or chosen.work / chosen.shape).absolute()
        if chosen.checkpoint is None:
            ensure_checkpoint(chosen.shape, source)
        peers = chosen.peers.absolute() if chosen.peers else None
        forms = chosen.forms or (FORMS if chosen.device == "cpu" else FORMS_GPU)
        folders = make_forms(source, list(forms), chosen.work.absolute(), peers, notes)
        generation = bench_generation(folders, chosen.device, threads, chosen.rounds, peers, notes)
        print_generation(generation, f"{machine['cpu']}: {source.name}", out)
        result["generation"] = [asdict(t) for t in generation]
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
