"""Run one command and measure it from outside: wall clock, CPU, and the memory of its whole process tree.

How it goes:
1. `warm_page_cache` and `touch_free_memory`, called beforehand, let every command find the machine in the same state.
2. The command runs in a session of its own; `wait4` returns its user + system CPU, and the peak RSS of the largest
   process, ended children included.
3. Meanwhile a thread reads from /proc, every 20 ms, RSS and anonymous memory of all its processes.
4. /proc/stat, before and after, says what the rest of the machine computed.

Costs 0.5 ms of CPU for each sample. What lives for less than 20 ms may not be seen.

Left out on purpose: a command's own idea of its time; and macOS, which has no /proc: what is read there is then 0.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SAMPLE_PERIOD_S = 0.02
MEMORY_FIELDS = {"VmRSS:", "RssAnon:", "VmHWM:"}  # of /proc/PID/status

OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""No tool may look for newer files or versions on the network while the clock runs."""


@dataclass(frozen=True)
class Measurement:
    """One command that ran to its end. Sizes in bytes, times in seconds.

    exit_code: negative after a signal.
    cpu_s: user + system, of the command and its ended children.
    other_cpu_s: what the rest of the machine computed meanwhile: other programs, the hypervisor's other guests, and the
        kernel's own writing to disk.
    peak_rss_bytes: of the largest process; never below what the process that started it held at that time.
    peak_main_rss_bytes: VmHWM, the kernel's own high-water mark of the command's main process, as last sampled.
    peak_tree_rss_bytes, peak_anonymous_bytes: VmRSS and RssAnon summed over all processes, the largest sample.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    other_cpu_s: float
    peak_rss_bytes: int
    peak_main_rss_bytes: int
    peak_tree_rss_bytes: int
    peak_anonymous_bytes: int
    n_samples: int

    @property
    def other_cpu_share(self) -> float:
        return self.other_cpu_s / (self.wall_s * len(os.sched_getaffinity(0)))


def measure_command(
    command: list[str],
    stdout: BinaryIO,
    stderr: int | None = subprocess.STDOUT,
    environment: Mapping[str, str] = OFFLINE,
) -> Measurement:
    """Run `command` to its end, whatever its exit code, and return what it took; an interrupt here kills it.

    Args:
        stdout: an open file that takes what it prints.
        stderr: as in `subprocess`: with stdout, or, where None, to this process's own.
        environment: laid over this process's own.
    """
    busy_s, start = read_busy_s(), time.perf_counter()
    # A session of its own, so that an interrupt can end it with all its children.
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
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
    return Measurement(
        exit_code=process.returncode,
        wall_s=wall_s,
        cpu_s=cpu_s,
        other_cpu_s=max(0.0, busy_s - cpu_s),
        peak_rss_bytes=usage.ru_maxrss * 1024,
        **sampler.get_peaks(),
    )


class MemorySampler:
    """The peak memory of a process and all its descendants, read from /proc in a thread of its own.

    `RssAnon` counts what cannot be dropped: heap, stacks, tensors. RSS adds mapped file pages, which the kernel takes
    back when it needs them, and counts a page once per process that maps it. Read from `status` and not from
    `smaps_rollup`, which walks the page tables and would slow down what is measured.
    """

    def __init__(self, pid: int) -> None:
        self._peak_main_rss = self._peak_tree_rss = self._peak_anonymous = self._n_samples = 0
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def get_peaks(self) -> dict[str, int]:
        """Return the fields of `Measurement` that were sampled."""
        return {
            "peak_main_rss_bytes": self._peak_main_rss,
            "peak_tree_rss_bytes": self._peak_tree_rss,
            "peak_anonymous_bytes": self._peak_anonymous,
            "n_samples": self._n_samples,
        }

    def _sample(self) -> None:
        while True:
            main, *descendants = (read_memory(pid) for pid in list_process_tree(self._pid))
            tree = (main, *descendants)
            # A process that has ended reads as empty.
            self._peak_main_rss = max(self._peak_main_rss, main.get("VmHWM:", 0))
            self._peak_tree_rss = max(self._peak_tree_rss, sum(memory.get("VmRSS:", 0) for memory in tree))
            self._peak_anonymous = max(self._peak_anonymous, sum(memory.get("RssAnon:", 0) for memory in tree))
            self._n_samples += 1
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
    """Return one process's `MEMORY_FIELDS` in bytes; empty once it has ended."""
    lines = (line.split() for line in _read_proc(f"/proc/{pid}/status").splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in MEMORY_FIELDS}


def read_busy_s() -> float:
    """Return the CPU time this machine has spent on anything since it started, stolen time included."""
    fields = _read_proc("/proc/stat").split()[1:9]
    if not fields:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _read_proc(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


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


def touch_free_memory(n_bytes: int) -> None:
    """Write to up to `n_bytes` of free memory and free it again, so that the host has given us those pages.

    A virtual machine that gives freed pages back to its host pays for getting each again at the first touch.
    """
    free_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    # In a process of its own: in this one it would put a floor of its size under the `ru_maxrss` of every child
    # measured later. Never all that is free, at the page cache's expense.
    program = "import sys; b'x' * int(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(min(n_bytes, free_bytes * 3 // 4))], check=True)
