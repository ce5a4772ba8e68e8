"""Time the conversion of one checkpoint by int8convert, by `cp -r` and by other tools, alternating on this machine.

Beside them stands what the disk alone takes to write half of the bytes of SRC past the page cache, the least that int8
weights can take: `bench_peers/disk.py`.

How it goes:
1. `bench_contestants` finds who can take part and who is not installed.
2. `bench_rounds` runs and measures everyone in turns, page cache warm.
3. A table of medians with their range is printed; all raw numbers with `--json`.

What is measured (`measure_command`): wall clock, alone and with the `sync` afterwards, because a command that returns
earlier may only have left more to the kernel: int8convert's files are on disk when it returns, the others' need not be.
User + system CPU and the largest process's peak RSS; RSS and anonymous memory of the whole process tree.

On a virtual machine that hands freed memory back to its host, the first touch of a page costs more than copying into
it: `cp -r` then takes several times as long, depending on what ran before. Touching free memory before each run evens
that out.

Left out on purpose: a contestant's own idea of its time, and quality (`int8convert verify`).
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bench_contestants import CONTESTANTS, COPY, DISK, OURS, Contestant, Entrant, find_entrants
from benchmarks.bench_rounds import Run, Settings, run_rounds

WORK_PARENT = Path(__file__).resolve().parents[1] / ".cache" / "bench"
PIPED_WIDTH = 120
DISTURBED_SHARE = 0.15  # a kernel thread writing to disk takes some on its own
MEMORY_COLUMNS = ("peak_rss_bytes", "peak_tree_rss_bytes", "peak_anonymous_bytes")


def describe_machine(work: Path) -> dict[str, object]:
    """Return what a reader needs to place the numbers; no names, no paths."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpu_info if line.startswith("model name")]
    file_system = subprocess.run(["stat", "-f", "-c", "%T", str(work)], check=True, capture_output=True, text=True)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().split("-")[0],  # what follows is the builder's own and may name a host
        "python": platform.python_version(),
        "file_system": file_system.stdout.strip(),
    }


def format_range(values: list[float], digits: int) -> str:
    """Return "median (min-max)", or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def find_median(runs: list[Run], field: str) -> float:
    return float(statistics.median(getattr(run, field) for run in runs))


def format_row(label: str, runs: list[Run], copies: list[Run], ours: list[Run]) -> list[str]:
    time = find_median(runs, "wall_and_sync_s")
    return [
        label,
        format_range([run.wall_s for run in runs], 1),
        format_range([run.wall_and_sync_s for run in runs], 1),
        *(f"{time / find_median(base, 'wall_and_sync_s'):.2f}" if base else "-" for base in (copies, ours)),
        format_range([run.cpu_s for run in runs], 1),
        *(f"{find_median(runs, column) / 1e6:.0f}" for column in MEMORY_COLUMNS),
        f"{runs[-1].bytes_out / 1e6:.0f}",
    ]


def build_table(title: str, entrants: list[Entrant], missing: list[Contestant], runs: dict[str, list[Run]]) -> Table:
    """Return one row per contestant, the fastest first, then those that failed or are not installed."""
    table = Table("who", title=title)
    headings = ("wall s", "wall + sync s", "/ cp -r + sync", "/ ours", "CPU s", "RSS", "tree RSS", "anon", "MB out")
    for heading in headings:
        table.add_column(heading, justify="right")
    labels = {entrant.contestant.name: entrant.contestant.label for entrant in entrants}
    valid = {name: done for name, done in runs.items() if done and not done[-1].exit_code}
    for name in sorted(valid, key=lambda name: find_median(valid[name], "wall_and_sync_s")):
        table.add_row(*format_row(labels[name], valid[name], valid.get(COPY, []), valid.get(OURS, [])))
    for name in [name for name in runs if name not in valid]:
        table.add_row(labels[name], "failed")
    for contestant in missing:
        table.add_row(contestant.label, "not installed")
    return table


def explain_columns(disk: list[Run]) -> str:
    """Return what the columns mean, and the disk's own rate if it was measured."""
    rate = statistics.median([run.bytes_out / run.wall_s for run in disk]) if disk else 0.0
    disk_rate = f"The disk alone writes {rate / 1e9:.2f} GB/s past the page cache.\n" if disk else ""
    floor_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return (
        disk_rate
        + "Every number is the median over the rounds, (min-max) their range; a ratio is of the medians of wall +\n"
        "sync. MB = 10^6 bytes. A new model is one int8convert has not met before, so transformers has to map it.\n"
        "wall, CPU: the whole command, start-up included, page cache warm. wall + sync: until a `sync` right after it\n"
        "is through: int8convert syncs its files to disk inside its wall time, the others leave that to the kernel.\n"
        f"RSS: peak of the largest process, never below this program's own {floor_mb:.0f} MB. tree RSS, anon: peak of\n"
        "the sum over all its processes, sampled every 20 ms; anon leaves out mapped file pages."
    )


def print_results(title: str, entrants: list[Entrant], missing: list[Contestant], runs: dict[str, list[Run]]) -> None:
    results = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    first = next((done[0] for done in runs.values() if done), None)
    size = f", {first.bytes_in / 1e9:.2f} GB" if first else ""
    results.print(build_table(title + size, entrants, missing, runs))
    results.print(explain_columns(runs.get(DISK, [])), markup=False, highlight=False)
    disturbance = max((run.other_cpu_share for done in runs.values() for run in done), default=0.0)
    if disturbance > DISTURBED_SHARE:
        warning = f"not clean: during one run other work took {disturbance:.0%} of this machine's cores"
        results.print(warning, style="bold", highlight=False)
    for contestant in missing:
        results.print(f"not installed: {contestant.name}: {contestant.pip}", markup=False, highlight=False)


def build_report(entrants: list[Entrant], missing: list[Contestant], runs: dict[str, list[Run]]) -> dict[str, object]:
    """Return everything measured, ready for JSON; raw runs, no medians."""
    contestants = [
        {
            "name": entrant.contestant.name,
            "label": entrant.contestant.label,
            "versions": entrant.versions,
            "runs": [asdict(run) for run in runs[entrant.contestant.name]],
        }
        for entrant in entrants
    ]
    not_installed = [{"name": contestant.name, "pip": contestant.pip} for contestant in missing]
    return {"contestants": contestants, "not_installed": not_installed}


@contextlib.contextmanager
def open_work(given: Path | None, *, keep: bool) -> Iterator[Path]:
    """Yield the directory to work in: the given one, which stays, or a new one under .cache, which does not."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    WORK_PARENT.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=WORK_PARENT))
    try:
        yield work
    finally:
        if not keep:
            shutil.rmtree(work)


def parse_names(text: str) -> list[Contestant]:
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    unknown = [name for name in text.split(",") if name not in by_name]
    if unknown:
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(by_name)}")
    return [by_name[name] for name in text.split(",")]


def parse_python(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in {contestant.name for contestant in CONTESTANTS}:
        raise argparse.ArgumentTypeError(f"'{name}' is no contestant; expected NAME=PATH_TO_PYTHON")
    # Not resolved: a virtual environment's python is a link, and the link's place is what makes it one.
    python = Path(path).absolute()
    if not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError(f"'{path}' is no program that can be run")
    return name, python


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1 up")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    names = ", ".join(contestant.name for contestant in CONTESTANTS)
    parser = argparse.ArgumentParser(description="Compare int8convert with `cp -r` and other tools on this machine.")
    parser.add_argument("--shape", choices=("tiny", "opt-1.3b", "opt-6.7b", "opt-13b"), default="opt-1.3b")
    parser.add_argument("--rounds", type=parse_count, default=3)
    parser.add_argument("--only", type=parse_names, default=list(CONTESTANTS), metavar="NAME,...", help=names)
    parser.add_argument(
        "--peer-env",
        type=parse_python,
        action="append",
        default=[],
        metavar="NAME=PATH_TO_PYTHON",
        help="run this contestant in another environment; may be given for each",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="work here; a source found here is used, and stays")
    parser.add_argument("--keep", action="store_true", help="leave every OUT, and the work directory, in place")
    parser.add_argument(
        "--touch-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write to free memory before each run (default): on a virtual machine that gives free pages back, the "
        "first touch of a page costs, and it would fall on whoever runs first",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number and the machine here")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    notes = Console(stderr=True)
    entrants, missing = find_entrants(options.only, dict(options.peer_env))
    with open_work(options.work, keep=options.keep) as work:
        machine = describe_machine(work)
        settings = Settings(work, keep=options.keep, touch_memory=options.touch_memory)
        runs = run_rounds(entrants, options.shape, options.rounds, settings, notes)
    touched = "touched" if options.touch_memory else "not touched"
    who = f"{machine['cpu']}, {machine['cores']} cores"
    title = f"{who}: {options.shape} shape, rounds: {options.rounds}, memory {touched} before each run"
    print_results(title, entrants, missing, runs)
    if options.json:
        facts = {"shape": options.shape, "touch_memory": options.touch_memory, "machine": machine}
        report = {"schema": 1, "benchmark": "convert", **facts, **build_report(entrants, missing, runs)}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if any(run.exit_code for done in runs.values() for run in done):
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
