#!/usr/bin/env python3
"""Time the conversion of one checkpoint by int8convert, by `cp -r` and by other tools, alternating on this machine.

How it goes:
1. A checkpoint with random weights is written (`make_checkpoint.py`), unless `--work` already holds one.
2. Each contestant converts a tiny checkpoint once, uncounted: its own files are then in the page cache, its kernels
   compiled.
3. Rounds A B C A B C ...: remove OUT, `sync`, read the source once so that the page cache holds it, then run and
   measure one whole command, start-up included. A slow drift of the machine meets all contestants alike.
4. A table of medians with their range; all raw numbers with `--json`.

What is measured: wall clock; user + system CPU and the largest process's peak RSS from `wait4`; the whole process
tree's RSS and anonymous memory from /proc, sampled every 20 ms; the time a `sync` takes afterwards, because a command
that returns earlier may only have left more to the kernel.

On a virtual machine that hands freed memory back to its host, the first touch of a page costs more than copying into
it: `cp -r` then takes several times as long, depending on what ran before. `--touch-memory` evens that out.

Left out on purpose: a contestant's own idea of its time, and quality (`int8convert verify`).
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCRIPTS = Path(__file__).resolve().parent
OURS, COPY = "int8convert", "cp"
INDEX_NAME = "model.safetensors.index.json"
SAMPLE_PERIOD_S = 0.02
PIPED_WIDTH = 150
DISTURBED_SHARE = 0.15  # a kernel thread writing to disk takes some on its own
MEMORY_FIELDS = {"VmRSS:": "rss", "RssAnon:": "anonymous"}  # of /proc/PID/status, and what they are called here
MEMORY_COLUMNS = ("peak_rss_bytes", "peak_tree_rss_bytes", "peak_anonymous_bytes")


@dataclass(frozen=True)
class Contestant:
    """One command to measure. It can run where the first of `packages` is installed; `pip` is the line that does so."""

    name: str
    label: str
    packages: tuple[str, ...]
    pip: str


# pip lines without versions: the table and the JSON say which version ran.
CONTESTANTS = (
    Contestant(OURS, "int8convert quantize", ("int8convert", "torch", "transformers", "numba"), "./scripts/setup"),
    Contestant(COPY, "cp -r", (), ""),
    Contestant(
        "transformers_bitsandbytes",
        "transformers + bitsandbytes",
        ("bitsandbytes", "transformers", "torch", "accelerate"),
        "pip install bitsandbytes transformers accelerate",
    ),
    Contestant(
        "torchao_int8",
        "torchao int8",
        ("torchao", "transformers", "torch", "accelerate"),
        "pip install torchao transformers accelerate",
    ),
    Contestant(
        "optimum_quanto",
        "optimum-quanto qint8",
        ("optimum-quanto", "transformers", "torch", "accelerate"),
        "pip install optimum-quanto transformers accelerate",
    ),
    Contestant(
        "llm_compressor",
        "llm-compressor, 2 workers",
        ("llmcompressor", "compressed-tensors", "transformers", "torch"),
        "pip install llmcompressor  # in an environment of its own: it pins an older transformers",
    ),
)


@dataclass(frozen=True)
class Run:
    """One measured command. Sizes in bytes, times in seconds; `exit_code` is negative after a signal.

    `other_cpu_s` is what the rest of the machine computed meanwhile: other programs, the hypervisor's other guests, and
    the kernel's own writing to disk.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    other_cpu_s: float
    peak_rss_bytes: int
    peak_tree_rss_bytes: int
    peak_anonymous_bytes: int
    n_samples: int
    sync_after_s: float
    bytes_in: int
    bytes_out: int

    @property
    def mb_per_s(self) -> float:
        return self.bytes_in / 1e6 / self.wall_s

    @property
    def other_cpu_share(self) -> float:
        return self.other_cpu_s / (self.wall_s * len(os.sched_getaffinity(0)))


class MemorySampler:
    """The peak memory of a process and all its descendants, read from /proc in a thread of its own.

    `RssAnon` counts what cannot be dropped: heap, stacks, tensors. RSS adds mapped file pages, which the kernel takes
    back when it needs them, and counts a page once per process that maps it. Read from `status` and not from
    `smaps_rollup`, which walks the page tables and would slow down what is measured; a sample costs about 0.5 ms.
    """

    def __init__(self, pid: int) -> None:
        self.peaks = dict.fromkeys(MEMORY_FIELDS.values(), 0)
        self.n_samples = 0
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            totals = dict.fromkeys(self.peaks, 0)
            for pid in list_process_tree(self._pid):
                for field, n_bytes in read_memory(pid).items():
                    totals[field] += n_bytes
            self.peaks = {field: max(self.peaks[field], totals[field]) for field in totals}
            self.n_samples += 1
            if self._stopped.wait(SAMPLE_PERIOD_S):
                return


def list_process_tree(root: int) -> Iterator[int]:
    """Yield `root` and the ids of its descendants; those that end meanwhile are passed over."""
    yield root
    # ESRCH comes from reading a file of a process that ended after it was opened.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{root}/task"):
            for child in _read_proc(f"/proc/{root}/task/{thread}/children").split():
                yield from list_process_tree(int(child))


def read_memory(pid: int) -> dict[str, int]:
    """Return one process's resident and anonymous bytes; empty once it has ended."""
    lines = (line.split() for line in _read_proc(f"/proc/{pid}/status").splitlines())
    return {MEMORY_FIELDS[words[0]]: int(words[1]) * 1024 for words in lines if words and words[0] in MEMORY_FIELDS}


def _read_proc(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@dataclass(frozen=True)
class Settings:
    """How every run of this benchmark is made; see `--help`."""

    work: Path
    keep: bool
    touch_memory: bool


def measure_command(command: list[str], src: Path, out: Path, log: Path, *, touch_memory: bool) -> Run:
    """Run `command` once and measure it; `out` is removed and the source read into the page cache beforehand."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    bytes_in = warm_page_cache(src)
    if touch_memory:
        touch_free_memory(2 * bytes_in)
    # No tool may look for newer files or versions on the network while the clock runs.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        busy_s, start = read_busy_s(), time.perf_counter()
        # A session of its own, so that an interrupt here can end it with its children before OUT is removed.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            with MemorySampler(process.pid) as sampler:
                _, status, usage = os.wait4(process.pid, 0)
                wall_s = time.perf_counter() - start
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    busy_s = read_busy_s() - busy_s
    process.returncode = os.waitstatus_to_exitcode(status)  # else Popen looks for a process that wait4 has reaped
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(
        exit_code=process.returncode,
        wall_s=wall_s,
        cpu_s=cpu_s,
        other_cpu_s=max(0.0, busy_s - cpu_s),
        peak_rss_bytes=usage.ru_maxrss * 1024,
        peak_tree_rss_bytes=sampler.peaks["rss"],
        peak_anonymous_bytes=sampler.peaks["anonymous"],
        n_samples=sampler.n_samples,
        sync_after_s=time_call(os.sync),
        bytes_in=bytes_in,
        bytes_out=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    )


def touch_free_memory(n_bytes: int) -> None:
    """Write to up to `n_bytes` of free memory and free it again, so that the host has given us those pages."""
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    # In a process of its own, for the same reason as `ensure_checkpoint`; and never at the page cache's expense.
    program = "import sys; b'x' * int(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(min(n_bytes, free_bytes * 3 // 4))], check=True)


def read_busy_s() -> float:
    """Return the CPU time this machine has spent on anything since it started, stolen time included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, _read_proc("/proc/stat").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def time_call(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def warm_page_cache(directory: Path) -> int:
    """Read every file once, so that the page cache holds it, and return their bytes."""
    buffer = bytearray(8 << 20)
    n_bytes = 0
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while n_read := file.readinto(buffer):
                    n_bytes += n_read
    return n_bytes


def build_command(contestant: Contestant, python: Path, src: Path, out: Path) -> list[str]:
    if contestant.name == COPY:
        return ["cp", "-r", str(src), str(out)]
    if contestant.name == OURS:
        return [str(python.parent / OURS), "quantize", str(src), str(out), "--overwrite"]
    return [str(python), str(SCRIPTS / "bench_peers" / f"{contestant.name}.py"), str(src), str(out)]


def read_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those `packages` that are installed in the environment of `python`."""
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p] for p in sys.argv[1:] if p in found}))"
    )
    answer = subprocess.run([str(python), "-c", program, *packages], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions


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


@dataclass(frozen=True)
class Entrant:
    """A contestant that can run here: with which Python, and which versions that one has."""

    contestant: Contestant
    python: Path
    versions: dict[str, str]


def find_entrants(wanted: list[Contestant], pythons: dict[str, Path]) -> tuple[list[Entrant], list[Contestant]]:
    """Split the wanted contestants into those that can run and those that are not installed."""
    entrants, missing = [], []
    for contestant in wanted:
        python = pythons.get(contestant.name, Path(sys.executable))
        versions = read_versions(python, contestant.packages) if contestant.packages else {}
        if contestant.packages and contestant.packages[0] not in versions:
            missing.append(contestant)
        else:
            entrants.append(Entrant(contestant, python, versions))
    return entrants, missing


def ensure_checkpoint(shape: str, directory: Path) -> None:
    """Write the source checkpoint unless a complete one is there: the index is written last."""
    if not (directory / INDEX_NAME).exists():
        # A process of its own: numpy in this one would put a floor of its size under every child's `ru_maxrss`.
        command = [sys.executable, str(SCRIPTS / "make_checkpoint.py"), shape, str(directory)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(1)  # it has said why


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


def run_entrant(entrant: Entrant, src: Path, settings: Settings, notes: Console) -> Run:
    """Measure one entrant once and remove its output again, unless the settings say to keep it."""
    name = entrant.contestant.name
    out, log = settings.work / f"{name}-out", settings.work / f"{name}.log"
    command = build_command(entrant.contestant, entrant.python, src, out)
    run = measure_command(command, src, out, log, touch_memory=settings.touch_memory)
    if run.exit_code:
        notes.print(f"{name} ended with exit code {run.exit_code}; its last lines:", style="bold red")
        notes.print("\n".join(log.read_text(errors="replace").splitlines()[-8:]), markup=False, highlight=False)
    if not settings.keep:
        shutil.rmtree(out, ignore_errors=True)
    return run


def format_range(values: list[float], digits: int) -> str:
    """Return "median (min-max)", or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def median_wall_s(runs: list[Run]) -> float:
    return statistics.median(run.wall_s for run in runs)


def format_ratio(runs: list[Run], base: list[Run]) -> str:
    return f"{median_wall_s(runs) / median_wall_s(base):.2f}" if base else "-"


def format_row(label: str, runs: list[Run], copies: list[Run], ours: list[Run]) -> list[str]:
    return [
        label,
        format_range([run.wall_s for run in runs], 2),
        format_ratio(runs, copies),
        format_ratio(runs, ours),
        format_range([run.cpu_s for run in runs], 1),
        format_range([run.sync_after_s for run in runs], 1),
        *(f"{statistics.median(getattr(run, column) for run in runs) / 1e6:.0f}" for column in MEMORY_COLUMNS),
        f"{statistics.median(run.mb_per_s for run in runs):.0f}",
        f"{runs[-1].bytes_out / 1e6:.0f}",
    ]


def build_table(title: str, entrants: list[Entrant], missing: list[Contestant], runs: dict[str, list[Run]]) -> Table:
    """Return one row per contestant, the fastest first, then those that failed or are not installed."""
    table = Table("who", title=title)
    for heading in ("wall s", "/ cp -r", "/ ours", "CPU s", "sync s", "RSS", "tree RSS", "anon", "MB/s in", "MB out"):
        table.add_column(heading, justify="right")
    labels = {entrant.contestant.name: entrant.contestant.label for entrant in entrants}
    valid = {name: done for name, done in runs.items() if done and not done[-1].exit_code}
    for name in sorted(valid, key=lambda name: median_wall_s(valid[name])):
        table.add_row(*format_row(labels[name], valid[name], valid.get(COPY, []), valid.get(OURS, [])))
    for name in [name for name in runs if name not in valid]:
        table.add_row(labels[name], "failed")
    for contestant in missing:
        table.add_row(contestant.label, "not installed")
    return table


def explain_columns() -> str:
    floor_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return (
        "Every number is the median over the rounds, (min-max) their range; a ratio is of two median wall times.\n"
        "wall, CPU: the whole command, start-up included, page cache warm, nothing forced to disk.\n"
        "sync: what a `sync` right afterwards took. MB = 10^6 bytes.\n"
        f"RSS: peak of the largest process, never below this program's own {floor_mb:.0f} MB. tree RSS, anon: peak of\n"
        "the sum over all its processes, sampled every 20 ms; anon leaves out mapped file pages."
    )


def print_results(title: str, entrants: list[Entrant], missing: list[Contestant], runs: dict[str, list[Run]]) -> None:
    results = Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
    first = next((done[0] for done in runs.values() if done), None)
    size = f", {first.bytes_in / 1e9:.2f} GB" if first else ""
    results.print(build_table(title + size, entrants, missing, runs))
    results.print(explain_columns(), markup=False, highlight=False)
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
    parent = SCRIPTS.parent / ".cache" / "bench"
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=parent))
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
    touch_help = "before each run, write to free memory of twice the source's size; for virtual machines"
    parser.add_argument("--touch-memory", action="store_true", help=touch_help)
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
    touched = ", memory touched before each run" if options.touch_memory else ""
    print_results(f"{options.shape} shape, rounds: {options.rounds}{touched}", entrants, missing, runs)
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
