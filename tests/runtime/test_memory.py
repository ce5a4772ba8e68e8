"""How much memory there is: the least of what system, container and limits leave."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from int8convert.runtime import memory


def test_machine_says_what_is_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    total = memory._read_kilobytes(Path("/proc/meminfo"))["MemTotal"]
    assert 0 < memory.available_bytes("cpu") <= total


@pytest.mark.parametrize(("limit", "expected"), [("100000000", 70_000_000), ("20000000", 0)])
def test_container_may_say_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.stat").write_text("anon 30000000\nfile 60000000\n")
    assert memory.available_bytes("cpu") == expected


def test_container_without_a_limit_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 30000000\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes("cpu") > 30_000_000


LIMITED = """
import resource
from pathlib import Path
from int8convert.runtime import memory

for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
    has = memory._read_kilobytes(Path("/proc/self/status"))[used]
    resource.setrlimit(limit, (has + 50_000_000, resource.RLIM_INFINITY))
    print(memory.available_bytes("cpu"))
    resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_limit_of_the_process_counts_from_what_it_has() -> None:
    """The limit of addresses, and that of data."""
    result = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    found = [int(line) for line in result.stdout.split()]
    assert len(found) == 2 and all(45_000_000 < free <= 50_000_000 for free in found)


def test_peak_counts_what_has_been_let_go_of() -> None:
    memory.start_peak()
    before = memory.resident_bytes()
    np.ones(8_000_000)
    assert before + 30_000_000 < memory.peak_bytes() <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory.start_peak()
    assert memory.peak_bytes() < before + 30_000_000
