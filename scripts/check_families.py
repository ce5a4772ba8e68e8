#!/usr/bin/env python3
"""Every text family transformers knows: a tiny model of it, converted here and by bitsandbytes, and the two compared.

How it goes:
1. `tests/tools/family_models.py` lists the families and builds a tiny, seeded model of each.
2. `tests/tools/family_check.py` converts and compares one; it says which outcomes there are.
3. Each family gets a forked process and a time limit, so that one that crashes or hangs ends as a line of the table.

What it costs: some six seconds and up to 2 GB of memory for a family and process; nothing is downloaded.

Exit code 1 if a family that runs in fp32 neither matches nor is refused with a reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.tools.family_check import FamilyResult, Outcome, check_family, map_in_this_process
from tests.tools.family_models import Family, families

COLOUR = {
    Outcome.MATCHES: "green",
    Outcome.MATCHES_FLAT: "green",
    Outcome.MATCHES_WITH_OUR_SKIPS: "green",
    Outcome.BEYOND_BITSANDBYTES: "cyan",
    Outcome.REFUSED: "yellow",
    Outcome.WRONG: "bold red",
}
PACKAGES = ("transformers", "bitsandbytes", "torch")


def check_in_child(family: Family, pipe: Any) -> None:
    """The life of a forked process: one family, its result as an object down the pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    map_in_this_process()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        pipe.send(check_family(family, Path(folder)))


def check_apart(family: Family, limit_s: float) -> FamilyResult:
    """One family in a process of its own; a crash and a time-out are results, too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check_in_child, args=(family, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit_s):
            result: FamilyResult = receiver.recv()
            return result
        detail = f"no result after {limit_s:.0f} s"
    except EOFError:
        process.join()
        detail = f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return FamilyResult(family.name, family.class_name, Outcome.WRONG, detail)


def print_results(console: Console, results: list[FamilyResult], is_verbose: bool) -> None:
    """The table, then the counts."""
    table = Table("family", "class", "outcome", "int8", "what else")
    for result in results:
        colour = COLOUR.get(result.outcome, "dim")
        table.add_row(
            result.family,
            result.class_name,
            f"[{colour}]{result.outcome}[/]",
            percent(result),
            remark(result) if is_verbose else remark(result)[:160],
        )
    console.print(table)
    for outcome, n in count(results).items():
        console.print(f"{n:4d}  {outcome}")


def percent(result: FamilyResult) -> str:
    return "" if result.coverage is None else f"{100 * result.coverage:.0f} %"


def remark(result: FamilyResult) -> str:
    """What a reader wants to know beside the outcome."""
    failure = f"bitsandbytes fails {result.bitsandbytes_fails}" if result.bitsandbytes_fails else ""
    return "; ".join(filter(None, (result.detail, failure)))


def count(results: list[FamilyResult]) -> dict[Outcome, int]:
    """Families by outcome, in the order of the outcomes."""
    found = Counter(result.outcome for result in results)
    return {outcome: found[outcome] for outcome in Outcome if found[outcome]}


def write_markdown(path: Path, results: list[FamilyResult]) -> None:
    """The table as a document."""
    versions = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES)
    lines = [
        "# Model families",
        "",
        "A tiny, randomly initialised model of every text family transformers knows, converted by int8convert and by",
        "transformers + bitsandbytes: the same keys, the same bytes of `weight` and `SCB`, the same logits, nothing",
        "missing and nothing unexpected on loading. Written by `./scripts/check_families`, with",
        f"{versions}.",
        "",
        "| outcome | families |",
        "|---|---|",
        *(f"| {outcome} | {n} |" for outcome, n in count(results).items()),
        "",
        "What the outcomes mean:",
        "",
        *(f"- *{outcome}*: {MEANING[outcome]}" for outcome in count(results)),
        "",
        "The share of parameters that becomes int8 is that of the tiny model, whose embeddings weigh more than a real",
        "one's. `stays 16-bit` lists the reasons for what does not, but for embeddings, heads and norms.",
        "",
        "| family | class | outcome | int8 | stays 16-bit | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        kept = ", ".join(reason for reason in result.kept if not reason.startswith(ORDINARY_REASONS))
        cells = (result.family, result.class_name, result.outcome, percent(result), kept, remark(result))
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


ORDINARY_REASONS = ("embedding", "output head", "not a matrix product")
MEANING = {
    Outcome.MATCHES: "all equal.",
    Outcome.MATCHES_FLAT: "bitsandbytes' CPU operation refuses inputs of four dimensions, which these models give "
    "it. All equal where both are given them flattened to two.",
    Outcome.MATCHES_WITH_OUR_SKIPS: "all equal once bitsandbytes is given the skip list of our output. By itself it "
    "makes something int8 that its own loader cannot find again, or that int8convert keeps for the reason given.",
    Outcome.BEYOND_BITSANDBYTES: "bitsandbytes breaks where the remark says. Our output loads, each int8 weight is "
    "what bitsandbytes' bare operation makes of it, and the logits are close to the source's.",
    Outcome.REFUSED: "an error of two lines before anything is written; the remark is its text.",
    Outcome.NOT_RUN: "the tiny model takes more than text, or fails in fp32 for reasons of its own.",
    Outcome.NOT_BUILT: "no tiny model can be made of the family's config without knowing more of it.",
    Outcome.WRONG: "none of these: a fault.",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="only these, by commas: model types, or task/model_type")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--write", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default: 2)")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one family (default: 180)")
    arguments = parser.parse_args()

    wanted = set(filter(None, arguments.families.split(",")))
    chosen = [f for f in families() if not wanted or {f.name, f.model_type} & wanted]
    unknown = wanted - {name for f in chosen for name in (f.name, f.model_type)}
    if unknown:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")

    # A forked process inherits no threads: nothing here may have started any.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        bar = progress.add_task("families", total=len(chosen))
        results = []
        for result in pool.map(lambda family: check_apart(family, arguments.limit), chosen):
            results.append(result)
            progress.advance(bar)
    print_results(console, results, is_verbose=bool(wanted))
    if arguments.json:
        content = {"versions": {p: version(p) for p in PACKAGES}, "families": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.write:
        write_markdown(arguments.write, results)
    return int(any(result.outcome is Outcome.WRONG for result in results))


if __name__ == "__main__":
    sys.exit(main())
