"""Shards that go to the Hub by a run that is stopped, resumed, replaced, or not alone: never one checkpoint of two."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import close_session
from safetensors.torch import load_file, save_file

from int8convert import errors
from int8convert.conversion.destination import PublishedDestination
from int8convert.publish.shard_publisher import HubPublisher
from tests.publish.stream_through import REPO, Stopped, at_shard, on_the_hub, stop_at, through
from tests.tools.hub_repositories import NAME, add, convert
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.tiny_models import file_bytes, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")

MINE = b"# My words\n"


@pytest.fixture
def source(hub: Hub, connect: Connect, tmp_path: Path) -> Path:
    """On the Hub, in shards of which the output has as many."""
    directory = save_checkpoint("llama", tmp_path / "source", max_shard_size="40KB")
    add(hub, directory)
    connect(hub, hub.token)
    return directory


def push_other_weights(hub: Hub, source: Path, tmp_path: Path) -> None:
    """Main moves to weights with the same headers."""
    other = shutil.copytree(source, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        halved = {name: (tensor * 0.5).contiguous() for name, tensor in load_file(path).items()}
        save_file(halved, path, {"format": "pt"})
    hub.repo(NAME).add_files({path.name: path for path in other.glob("*.safetensors")})


def test_shards_of_another_commit_are_not_resumed_behind_once_overwritten(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        through(tmp_path / "1", on_event=stop_at(4))
    push_other_weights(hub, source, tmp_path)
    with pytest.raises(Stopped):
        through(tmp_path / "2", overwrite=True, on_event=stop_at(2))

    through(tmp_path / "3", overwrite=True)

    convert(NAME, tmp_path / "expected", reader="stream")
    assert on_the_hub(hub) == file_bytes(tmp_path / "expected")


def test_repository_that_is_being_overwritten_does_not_look_complete(hub: Hub, source: Path, tmp_path: Path) -> None:
    through(tmp_path / "1")
    old = on_the_hub(hub)
    push_other_weights(hub, source, tmp_path)

    with pytest.raises(Stopped):
        through(tmp_path / "2", overwrite=True, on_event=stop_at(3))

    there = on_the_hub(hub)
    assert not {"config.json", "model.safetensors.index.json", "int8convert/manifest.json"} & there.keys()
    shards = {name for name in there if name.endswith(".safetensors")}
    assert shards and not [name for name in shards if there[name] == old[name]]


def test_repository_changed_by_somebody_else_is_not_completed(hub: Hub, source: Path, tmp_path: Path) -> None:
    def interfere() -> None:
        hub.repo(REPO).add_files({"model-00001-of-00009.safetensors": b"another writer's"})

    with pytest.raises(errors.HubError) as caught:
        through(tmp_path / "work", on_event=at_shard(3, interfere))

    assert caught.value.message == f"somebody else changed '{REPO}' in the meantime"
    assert "config.json" not in on_the_hub(hub)
    through(tmp_path / "work")
    convert(NAME, tmp_path / "expected", reader="stream")
    assert on_the_hub(hub) == file_bytes(tmp_path / "expected")


def test_shard_that_differs_at_the_end_keeps_it_from_being_completed(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last shard and the last commit, where no parent is known yet."""
    complete = HubPublisher.complete

    def after_a_push(self: HubPublisher, out: Path) -> None:
        name = min(name for name in hub.repo(REPO).files if name.endswith(".safetensors"))
        hub.repo(REPO).add_files({name: b"another writer's"})
        complete(self, out)

    with monkeypatch.context() as patch:
        patch.setattr(HubPublisher, "complete", after_a_push)
        with pytest.raises(errors.HubError, match="has other bytes on the Hub than it had here"):
            through(tmp_path / "work")
    assert "config.json" not in on_the_hub(hub)

    through(tmp_path / "work")

    convert(NAME, tmp_path / "expected", reader="stream")
    assert on_the_hub(hub) == file_bytes(tmp_path / "expected")


def test_card_tells_of_the_repository_whatever_directory_has_its_name(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through(tmp_path / "elsewhere")
    expected = hub.repo(REPO).files["README.md"]
    hub.repo(REPO).commit("main", "begin anew", {}, list(hub.repo(REPO).files))
    monkeypatch.chdir(tmp_path)

    through(Path(REPO))

    assert hub.repo(REPO).files["README.md"] == expected


def test_card_that_somebody_wrote_stays_unless_told(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, {"README.md": MINE})
    publisher = HubPublisher(REPO)
    convert(NAME, tmp_path / "work", reader="stream", destination=PublishedDestination(publisher))
    assert publisher.keeps_card and hub.repo(REPO).files["README.md"] == MINE

    through(tmp_path / "work", overwrite=True)

    assert b"library_name: transformers" in hub.repo(REPO).files["README.md"]


def test_finished_checkpoint_is_not_sent_away_without_being_told(hub: Hub, source: Path, tmp_path: Path) -> None:
    convert(NAME, tmp_path / "out", reader="stream")
    before = file_bytes(tmp_path / "out")

    with pytest.raises(errors.OutputError) as caught:
        through(tmp_path / "out")

    assert "is a finished checkpoint, which would be removed once it is sent" in caught.value.message
    assert file_bytes(tmp_path / "out") == before and hub.state.repository(REPO) is None
    through(tmp_path / "out", keeps=True)
    assert file_bytes(tmp_path / "out") == before == on_the_hub(hub)


def test_nothing_is_made_on_the_hub_before_the_disk_was_looked_at(hub: Hub, source: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.DiskFullError, match="--max-disk allows 1,000"):
        through(tmp_path / "work", max_disk=1000)
    assert hub.state.repository(REPO) is None


def test_shards_kept_by_an_earlier_run_go_when_they_are_not_to_be_kept(hub: Hub, source: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(Stopped):
        through(work, keeps=True, on_event=stop_at(4))
    there = {name for name in on_the_hub(hub) if name.endswith(".safetensors")}
    assert there and {path.name for path in work.glob("*.safetensors")} >= there
    here: set[str] = set()

    through(work, on_event=at_shard(4, lambda: here.update(path.name for path in work.glob("*.safetensors"))))

    assert not here & there


def test_records_without_what_was_asked_are_no_conversion(hub: Hub, source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        through(tmp_path / "work", on_event=stop_at(3))
    hub.repo(REPO).commit("main", "lose it", {}, ["int8convert/conversion.json"])

    with pytest.raises(errors.OutputError, match="holds weights of something else"):
        through(tmp_path / "elsewhere")

    through(tmp_path / "elsewhere", overwrite=True)
    assert "config.json" in on_the_hub(hub)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/commit/"), ("PUT", ""), ("POST", "/repos/create"), ("POST", "/preupload/"), ("POST", "objects/batch")],
)
def test_silent_connection_is_given_up_and_tried_again(
    method: str, path: str, hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own accord the client would wait for ever, here until the stall is over, and ask once."""
    other = PublishedDestination(HubPublisher("me/other"))
    convert(NAME, tmp_path / "other", reader="stream", threshold=3.0, destination=other)
    for content in hub.repo("me/other").files.values():
        hub.state.blobs.forget(hashlib.sha256(content).hexdigest())
    n_undisturbed = len(hub.log.requests(method, path))
    hub.log.clear()
    close_session()
    monkeypatch.setattr("int8convert.hub.branch._ANSWER_S", 0.5)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "8")
    hub.faults.add(FaultKind.STALL, method=method, path=path, seconds=6, after_bytes=0)

    through(tmp_path / "work")

    assert len(hub.faults.fired) == 1
    assert len(hub.log.requests(method, path)) > n_undisturbed
    convert(NAME, tmp_path / "expected", reader="stream")
    assert on_the_hub(hub) == file_bytes(tmp_path / "expected")


def test_waits_the_hub_asks_of_a_commit_do_not_end_the_run(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It allows so many commits an hour, and says when the next may come."""
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "0.5")
    hub.faults.add(FaultKind.TOO_MANY_REQUESTS, method="POST", path="/commit/", nth=2, times=2, seconds=1)

    through(tmp_path / "work")

    assert len(hub.faults.fired) == 2
    assert "config.json" in on_the_hub(hub)
