"""The runs of `bench_convert`: every contestant's conversions of one checkpoint, in turns, each measured.

How it goes:
1. A checkpoint with random weights is written (`make_checkpoint.py`), unless the work directory already holds one.
2. Each contestant converts a tiny checkpoint once, uncounted: its own files are then in the page cache, its kernels
   compiled.
3. Rounds A B C A B C ...: remove OUT, `sync`, read the source once so that the page cache holds it, touch free memory,
   then measure one whole command, start-up included, and the `sync` after it. A slow drift of the machine meets all
   contestants alike.

Costs the source and one OUT on disk.

Left out on purpose: what to make of the measurements; that is `bench_convert`.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.bench_contestants import OURS, Entrant, build_command
from scripts.measure_command import Measurement, measure_command, touch_free_memory, warm_page_cache

MAKE_CHECKPOINT = Path(__file__).resolve().with_name("make_checkpoint.py")
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class Settings:
    """How every run is made; see `bench_convert --help`."""

    work: Path
    keep: bool
    touch_memory: bool


@dataclass(frozen=True)
class Run(Measurement):
    """One measured conversion: how long a `sync` right after it took, and the sizes of SRC and OUT."""

    sync_after_s: float
    bytes_in: int
    bytes_out: int

    @property
    def wall_and_sync_s(self) -> float:
        return self.wall_s + self.sync_after_s


def run_rounds(
    entrants: list[Entrant], shape: str, n_rounds: int, settings: Settings, notes: Console
) -> dict[str, list[Run]]:
    """Warm up, then run every entrant once per round; one that fails is left out of the rounds after.

    Returns:
        Each entrant's runs in order, the warm-up left out. A failed run, or a failed warm-up, is the last of its list.
    """
    tiny, src = settings.work / "tiny", settings.work / shape
    ensure_checkpoint("tiny", tiny)
    ensure_checkpoint(shape, src)
    runs: dict[str, list[Run]] = {}
    for entrant in entrants:
        notes.print(f"warm-up: {entrant.contestant.label}")
        warm_up = run_entrant(entrant, tiny, settings, notes)
        runs[entrant.contestant.name] = [warm_up] if warm_up.exit_code else []
    for number in range(1, n_rounds + 1):
        for entrant in entrants:
            done = runs[entrant.contestant.name]
            if done and done[-1].exit_code:
                continue
            done.append(run_entrant(entrant, src, settings, notes))
            notes.print(f"round {number}: {entrant.contestant.label}: {done[-1].wall_s:.2f} s")
    return runs


def ensure_checkpoint(shape: str, directory: Path) -> None:
    """Write the source checkpoint unless a complete one is there: the index is written last."""
    if not (directory / INDEX_NAME).exists():
        # A process of its own: numpy in this one would put a floor of its size under every child's `ru_maxrss`.
        command = [sys.executable, str(MAKE_CHECKPOINT), shape, str(directory)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(1)  # it has said why


def run_entrant(entrant: Entrant, src: Path, settings: Settings, notes: Console) -> Run:
    """Measure one entrant once and remove its output again, unless the settings say to keep it."""
    name = entrant.contestant.name
    out, log = settings.work / f"{name}-out", settings.work / f"{name}.log"
    cache = settings.work / "cache"
    if name == OURS:
        shutil.rmtree(cache, ignore_errors=True)  # a model it has not seen; the same again comes right after it
    command = build_command(entrant.contestant, entrant.python, src, out, cache)
    run = measure_conversion(command, src, out, log, touch_memory=settings.touch_memory)
    if run.exit_code:
        notes.print(f"{name} ended with exit code {run.exit_code}; its last lines:", style="bold red")
        notes.print("\n".join(log.read_text(errors="replace").splitlines()[-8:]), markup=False, highlight=False)
    if not settings.keep:
        shutil.rmtree(out, ignore_errors=True)
    return run


def measure_conversion(command: list[str], src: Path, out: Path, log: Path, *, touch_memory: bool) -> Run:
    """Run `command` once and measure it; `out` is removed and the source read into the page cache beforehand."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    bytes_in = warm_page_cache(src)
    if touch_memory:
        touch_free_memory(2 * bytes_in)
    with log.open("wb") as output:
        measurement = measure_command(command, output)
    return Run(
        **asdict(measurement),
        sync_after_s=time_call(os.sync),
        bytes_in=bytes_in,
        bytes_out=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )


def time_call(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
