"""A checkpoint fetched into the Hub's cache, to be run: all of it, right, and nothing twice."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from int8convert.errors import CorruptFileError, DiskFullError
from int8convert.events import DownloadStarted, Event
from int8convert.hub import cached_copy
from int8convert.hub.cached_copy import fetch_checkpoint
from int8convert.hub.open_repository import open_repository
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

pytestmark = pytest.mark.usefixtures("quick_waits")

NAMES = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def weights(hub: Hub, connect: Connect, tmp_path: Path) -> dict[str, bytes]:
    """The weight files that are on the Hub."""
    files = opt_66b(tmp_path / "model")
    hub.add_repo(NAME, files)
    connect(hub)
    return {name: Path(str(files[name])).read_bytes() for name in NAMES}


def copied(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.bin"))}


def test_all_weights_are_fetched_once(hub: Hub, weights: dict[str, bytes]) -> None:
    events: list[Event] = []
    first = fetch_checkpoint(open_repository(NAME), events.append)
    assert copied(first) == weights and (first / "config.json").is_file()
    assert events == [DownloadStarted(name, len(content)) for name, content in weights.items()]
    events.clear()

    assert fetch_checkpoint(open_repository(NAME), events.append) == first
    assert not events


def test_trouble_that_passes_is_waited_for(hub: Hub, weights: dict[str, bytes]) -> None:
    hub.faults.add(FaultKind.UNAVAILABLE, origin=Origin.STORAGE, nth=7, times=6)
    assert copied(fetch_checkpoint(open_repository(NAME))) == weights
    assert len(hub.faults.fired) > 5, "more often than the client tries by itself"


def test_wrong_bytes_are_refused_removed_and_fetched_again(hub: Hub, weights: dict[str, bytes]) -> None:
    hub.faults.add(FaultKind.WRONG_BYTES, origin=Origin.STORAGE, nth=8, seed=1)
    with pytest.raises(CorruptFileError) as caught:
        fetch_checkpoint(open_repository(NAME))
    assert caught.value.message == f"'{NAMES[1]}' of '{NAME}' came with other bytes than the Hub lists"

    assert copied(fetch_checkpoint(open_repository(NAME))) == weights


def test_room_is_needed_for_what_lacks(
    hub: Hub, weights: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = sum(map(len, weights.values()))
    free = needed - 1
    monkeypatch.setattr(cached_copy.shutil, "disk_usage", lambda path: Usage(needed, 0, free))
    with pytest.raises(DiskFullError, match=rf"needs {needed:,} bytes for '{NAME}', its disk has {free:,} free"):
        fetch_checkpoint(open_repository(NAME))
    assert not list((tmp_path / "client").rglob("*.bin"))


def test_only_what_lacks_counts(hub: Hub, weights: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fetch_checkpoint(open_repository(NAME))
    (directory / NAMES[0]).resolve().unlink()
    (directory / NAMES[0]).unlink()
    monkeypatch.setattr(cached_copy.shutil, "disk_usage", lambda path: Usage(0, 0, len(weights[NAMES[0]])))

    assert copied(fetch_checkpoint(open_repository(NAME))) == weights


def test_commit_that_was_looked_up_is_fetched_whatever_is_pushed_meanwhile(hub: Hub, weights: dict[str, bytes]) -> None:
    def push(event: Event) -> None:
        if event == DownloadStarted(NAMES[0], len(weights[NAMES[0]])):
            hub.repo(NAME).add_files({NAMES[1]: b"other"})

    assert copied(fetch_checkpoint(open_repository(NAME), push)) == weights
