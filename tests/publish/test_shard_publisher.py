"""Shards arrive in the repository and branch that were asked for, each commit once, whatever answer gets lost."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi

from int8convert import errors
from int8convert.conversion.destination import PublishedDestination
from int8convert.events import Event, FileSent, ShardSkipped
from int8convert.publish.shard_publisher import HubPublisher
from tests.publish.stream_through import REPO, Stopped, on_the_hub, stop_at, through
from tests.tools.hub_repositories import NAME, convert
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility

pytestmark = pytest.mark.usefixtures("map_in_process")


def test_shard_that_is_replaced_before_the_card_is_told(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Somebody pushes between the commit that completes it and the model card, which says how good it is."""

    def push(event: Event) -> None:
        if isinstance(event, FileSent) and event.name == "config.json":
            hub.repo(REPO).add_files({"model-00003-of-00005.safetensors": b"somebody else's"})

    destination = PublishedDestination(HubPublisher(REPO, on_event=push))
    with pytest.raises(errors.HubError) as caught:
        convert(NAME, tmp_path / "work", reader="stream", destination=destination)
    assert caught.value.message == f"somebody else changed '{REPO}' in the meantime"


def test_private_repository_and_branch_are_made_as_asked(
    hub: Hub, connect: Connect, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add_repo("me/there", {"notes.txt": b"mine"})
    convert(
        NAME,
        tmp_path / "a",
        reader="stream",
        destination=PublishedDestination(HubPublisher("me/there", revision="int8")),
    )
    found = hub.repo("me/there")
    assert {name: found.files_at("int8")[name] for name in expected} == expected
    assert found.files == {"notes.txt": b"mine"}


def test_private_is_asked_for(hub: Hub, connect: Connect, expected: dict[str, bytes], tmp_path: Path) -> None:
    convert(NAME, tmp_path / "a", reader="stream", destination=PublishedDestination(HubPublisher(REPO, private=True)))
    assert hub.repo(REPO).visibility is Visibility.PRIVATE


def test_commit_whose_answer_got_lost_is_not_made_twice_by_the_publisher(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commits: of a shard, of what completes it, which deletes notes, and of the card."""
    create_commit = HfApi.create_commit
    n_made = 0

    def losing(self: HfApi, *arguments: object, **options: object) -> object:
        nonlocal n_made
        n_made += 1
        create_commit(self, *arguments, **options)  # type: ignore[arg-type]
        raise httpx2.ReadError("cut")

    monkeypatch.setattr(HfApi, "create_commit", losing)
    through(tmp_path / "work")
    assert on_the_hub(hub) == expected
    assert n_made == 5 + 2


def test_commit_of_a_shard_is_not_thought_made_by_what_was_there(
    hub: Hub, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of the same names with other bytes do not show that the commit got through."""
    through(tmp_path / "other", threshold=3.0)
    create_commit = HfApi.create_commit
    lost: list[str] = []

    def losing(self: HfApi, *arguments: object, **options: object) -> object:
        message = str(options["commit_message"])
        if message not in lost:
            lost.append(message)
            raise httpx2.ReadError("cut")
        return create_commit(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_commit", losing)
    through(tmp_path / "work", overwrite=True)
    assert {name: hub.repo(REPO).files[name] for name in expected} == expected
    assert not [name for name in hub.repo(REPO).files if name.startswith("int8convert/shards/")]


def test_rerun_into_a_branch_goes_on_with_it(hub: Hub, expected: dict[str, bytes], tmp_path: Path) -> None:
    hub.add_repo(REPO, {"notes.txt": b"mine"})

    def into_branch(**options: object) -> list[object]:
        destination = PublishedDestination(HubPublisher(REPO, revision="int8"))
        return list(convert(NAME, tmp_path / "work", reader="stream", destination=destination, **options))

    with pytest.raises(Stopped):
        into_branch(on_event=stop_at(3))
    events = into_branch()
    assert [event for event in events if isinstance(event, ShardSkipped)]
    files = hub.repo(REPO).files_at("int8")
    assert {name: files[name] for name in expected} == expected
    assert hub.repo(REPO).files == {"notes.txt": b"mine"}
