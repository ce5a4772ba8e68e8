"""What the command takes while it reads from the Hub, looked at from outside: its disk, and its anonymous memory.

Of 330 MB in seven shards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client_process import ROOT
from tests.hub.models import opt_66b
from tests.hub.sampling import Sampler, disk_bytes
from tests.hub_server.hub import Hub

MB = 10**6
MOST_ANONYMOUS = 600 * MB + 2 * 16 * MB
"""And two threads' blocks, which in a matrix that is read by columns come to so much."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path, list[int]]]:
    """A Hub with `org/large`, a cache of model maps, and the sizes of the shards."""
    folder = tmp_path_factory.mktemp("large")
    with Hub(folder / "hub") as hub:
        files = opt_66b(folder / "model", 7, width=1536, n_layers=5)
        hub.add_repo("org/large", files)
        sizes = [Path(str(path)).stat().st_size for name, path in files.items() if name.endswith(".bin")]
        yield hub, folder / "maps", sorted(sizes)


@pytest.mark.parametrize("reader", ["stream", "download"])
@pytest.mark.parametrize("max_shard_size", [None, "200MB"])
def test_disk_and_memory_are_bounded(
    large: tuple[Hub, Path, list[int]], tmp_path: Path, reader: str, max_shard_size: str | None
) -> None:
    hub, maps, sizes = large
    out, home = tmp_path / "out", tmp_path / "home"
    environment = os.environ | hub.client_environment() | {"HF_HOME": str(home), "XDG_CACHE_HOME": str(maps)}
    command = [sys.executable, "-m", "int8convert", "quantize", "org/large", str(out), "--reader", reader]
    command += ["--workers", "2", *(["--max-shard-size", max_shard_size] if max_shard_size else [])]
    run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with Sampler(run.pid, [out, home]) as sampler:
        output, _ = run.communicate()
    assert run.returncode == 0, output.decode()

    written = disk_bytes(out) + disk_bytes(home)
    assert sum(sizes) / 2 < written < sum(sizes) * 0.6
    beside = 100 * MB if reader == "stream" else sum(sizes[-2:]) + MB
    print(
        f"{reader} {max_shard_size}: disk {sampler.disk_bytes - written:,} beside {written:,}, "
        f"anonymous {sampler.anonymous_bytes:,}"
    )
    assert sampler.disk_bytes <= written + beside
    if reader == "stream":
        assert sampler.disk_bytes <= written + MB, "nothing of the source is on the disk"
    assert sampler.anonymous_bytes <= MOST_ANONYMOUS
