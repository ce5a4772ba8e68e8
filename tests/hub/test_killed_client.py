"""A conversion that is killed at any moment and run again gives the same bytes, and fetches no finished shard again."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from int8convert.checkpoint.manifest import Manifest
from tests.tools.client_process import ClientProcesses
from tests.tools.hub_conversions import READERS, begin_anew, looks_complete, places
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes

N_SHARDS = 5
BYTES_PER_S = 6e6
SEEDS = [pytest.param(range(5), id="few"), pytest.param(range(5, 40), id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def killed_hub(
    tmp_path_factory: pytest.TempPathFactory, link_maps: Callable[[Path], None]
) -> Iterator[tuple[Hub, Path, ClientProcesses]]:
    """A Hub with a repository, its folder, and processes that convert it."""
    folder = tmp_path_factory.mktemp("killed")
    link_maps(folder / "cache")
    with Hub(folder / "hub") as hub:
        files = opt_66b(folder / "model", N_SHARDS)
        hub.add_repo(NAME, files)
        environment = hub.client_environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
        with ClientProcesses(folder / "model" / "bin", environment) as clients:
            yield hub, folder, clients


def fetched_shards(hub: Hub) -> set[str]:
    """Hashes of the files that were asked for as a whole."""
    requests = hub.log.requests("GET", "/objects/", Origin.STORAGE)
    return {request.path.rpartition("/")[2] for request in requests if request.range is None}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("reader", READERS)
def test_killed_conversion_is_resumed_behind_its_finished_shards(
    killed_hub: tuple[Hub, Path, ClientProcesses], tmp_path: Path, reader: str, seeds: range
) -> None:
    hub, folder, clients = killed_hub
    tree = hub.repo(NAME).find("main").tree
    sources = [tree[f"pytorch_model-{i + 1:05d}-of-{N_SHARDS:05d}.bin"].sha256 for i in range(N_SHARDS)]
    begin_anew(hub, folder / "hub" / "client")
    before_bytes = hub.bandwidth.passed_bytes
    clients.start(src=NAME, out=str(tmp_path / "undisturbed"), reader=reader)
    assert clients.wait() == 0
    whole_bytes = hub.bandwidth.passed_bytes - before_bytes
    expected = file_bytes(tmp_path / "undisturbed")
    n_finished = []
    for seed, n_bytes in places(seeds, whole_bytes):
        out = tmp_path / str(seed)
        hub.bandwidth.bytes_per_s = BYTES_PER_S
        clients.run_until(n_bytes, hub.bandwidth, src=NAME, out=str(out), reader=reader)
        # What tells how to resume is removed last of all, behind what makes a checkpoint of it.
        assert not looks_complete(out) or expected.items() <= file_bytes(out).items(), f"seed {seed}"
        n_finished.append(len(Manifest(out).read_records()))
        hub.log.clear()
        hub.bandwidth.bytes_per_s = None

        clients.start(src=NAME, out=str(out), reader=reader)

        assert clients.wait() == 0
        assert file_bytes(out) == expected, f"seed {seed}"
        assert fetched_shards(hub) == set(sources[n_finished[-1] :]), f"seed {seed}"
    assert len(set(n_finished)) > 1, "every kill came before the first shard was finished"


@pytest.mark.parametrize("second", READERS)
def test_killed_download_leaves_nothing_however_it_goes_on(
    killed_hub: tuple[Hub, Path, ClientProcesses], tmp_path: Path, second: str
) -> None:
    hub, folder, clients = killed_hub
    begin_anew(hub, folder / "hub" / "client")
    hub.bandwidth.bytes_per_s = BYTES_PER_S / 4
    out = tmp_path / "out"
    clients.start(src=NAME, out=str(out), reader="download")
    while not list(out.rglob("*.incomplete")):
        time.sleep(0.01)
    clients.kill()
    assert clients.wait() == -signal.SIGKILL
    hub.bandwidth.bytes_per_s = None

    clients.start(src=NAME, out=str(out), reader=second)

    assert clients.wait() == 0
    assert sorted(path.name for path in out.rglob("*") if path.is_dir()) == ["int8convert"]
    assert not list(out.rglob("*.incomplete")) and not list(out.rglob("*.bin"))
