"""A conversion through a small disk that is killed at any moment ends in the same repository; no shard goes twice."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.client_process import ClientProcesses
from tests.tools.hub_conversions import begin_anew, places
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

N_SHARDS = 5
BYTES_PER_S = 6e6
SEEDS = [pytest.param(range(4), id="few"), pytest.param(range(4, 36), id="many", marks=pytest.mark.slow)]


@pytest.fixture
def killed_hub(tmp_path: Path, link_maps: Callable[[Path], None]) -> Iterator[tuple[Hub, Path, ClientProcesses]]:
    """A Hub with a repository, its folder, and processes that convert it."""
    folder = tmp_path / "killed"
    link_maps(folder / "cache")
    with Hub(folder / "hub") as hub:
        hub.add_repo(NAME, opt_66b(folder / "model", N_SHARDS))
        environment = hub.client_environment(hub.token) | {"XDG_CACHE_HOME": str(folder / "cache")}
        with ClientProcesses(folder / "model" / "bin", environment) as clients:
            yield hub, folder, clients


def of_method(hub: Hub, method: str) -> set[str]:
    """Paths in the store of what was sent or fetched as a whole."""
    requests = hub.log.requests(method, "/objects/", Origin.STORAGE)
    return {request.path for request in requests if request.range is None and request.status == 200}


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_killed_run_is_gone_on_with_from_what_the_repository_has(
    killed_hub: tuple[Hub, Path, ClientProcesses], tmp_path: Path, is_elsewhere: bool, seeds: range
) -> None:
    hub, folder, clients = killed_hub
    tree = hub.repo(NAME).find("main").tree
    sources = [tree[f"pytorch_model-{i + 1:05d}-of-{N_SHARDS:05d}.bin"].sha256 for i in range(N_SHARDS)]
    kind = f"{is_elsewhere}-{seeds.start}"
    begin_anew(hub, folder / "hub" / "client")
    before_bytes = hub.bandwidth.passed_bytes
    clients.start(src=NAME, out=str(tmp_path / "undisturbed"), reader="stream", upload=f"me/{kind}")
    assert clients.wait() == 0
    whole_bytes = hub.bandwidth.passed_bytes - before_bytes
    expected = hub.repo(f"me/{kind}").files
    shards = {name: hashlib.sha256(expected[name]).hexdigest() for name in expected if name.endswith(".safetensors")}
    n_finished = []
    for seed, n_bytes in places(seeds, whole_bytes):
        repository = f"me/{kind}-{seed}"
        for sha256 in shards.values():  # or nothing would be sent: the store had it all from the run before
            hub.state.blobs.forget(sha256)
        hub.bandwidth.bytes_per_s = BYTES_PER_S
        arguments = {"src": NAME, "out": str(tmp_path / "out"), "reader": "stream", "upload": repository}
        clients.run_until(n_bytes, hub.bandwidth, **arguments)
        there = hub.repo(repository).files if hub.state.repository(repository) else {}
        assert "config.json" not in there or there.items() | {("README.md", b"")} >= {
            (name, content) for name, content in expected.items() if name != "README.md"
        }, f"seed {seed}: half of it looks like a checkpoint"
        finished = {name for name in there if name in shards}
        assert all(there[name] == expected[name] for name in finished)
        n_finished.append(len(finished))
        hub.log.clear()
        hub.bandwidth.bytes_per_s = None
        if is_elsewhere:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

        clients.start(**arguments)

        assert clients.wait() == 0
        found = dict(hub.repo(repository).files)
        assert found.pop("README.md").replace(repository.encode(), f"me/{kind}".encode()) == expected["README.md"]
        assert found == {name: content for name, content in expected.items() if name != "README.md"}, f"seed {seed}"
        assert not (tmp_path / "out").exists()
        sent = {path.rpartition("/")[2] for path in of_method(hub, "PUT")}
        assert sent <= {shards[name] for name in shards.keys() - finished}, f"seed {seed}: a shard was sent again"
        fetched = {path.rpartition("/")[2] for path in of_method(hub, "GET")}
        assert not fetched & set(sources[: len(finished)]), f"seed {seed}: a finished shard was fetched again"
    assert len(set(n_finished)) > 1, "every kill came before the first shard was on the Hub"
