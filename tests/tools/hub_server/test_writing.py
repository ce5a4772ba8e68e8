"""What the unmodified client uploads arrives, byte for byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.repositories import Visibility

WEIGHTS = random.Random(8).randbytes(300_000)
CARD = b"---\nlibrary_name: transformers\n---\n# A model\n"


def test_created_repository_is_empty_and_of_the_visibility_asked_for(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)

    assert api.create_repo("org/public").repo_id == "org/public"
    api.create_repo("org/private", private=True)

    assert hub.repo("org/public").files == {}
    assert hub.repo("org/public").visibility is Visibility.PUBLIC
    assert hub.repo("org/private").visibility is Visibility.PRIVATE


def test_existing_repository_is_no_error_where_that_is_allowed(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    hub.add_repo("org/model", {"config.json": b"{}"})

    assert api.create_repo("org/model", exist_ok=True).repo_id == "org/model"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("org/model")
    assert hub.repo("org/model").files == {"config.json": b"{}"}


def test_uploaded_file_arrives_through_lfs_or_git(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")

    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="org/model")
    api.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id="org/model")

    assert hub.repo("org/model").files == {"model.safetensors": WEIGHTS, "README.md": CARD}
    tree = hub.repo("org/model").find("main").tree
    assert {path: entry.is_lfs for path, entry in tree.items()} == {"model.safetensors": True, "README.md": False}
    (put,) = hub.log.requests("PUT")
    assert (put.origin, put.received_bytes) == (Origin.STORAGE, len(WEIGHTS))


def test_large_file_arrives_in_parts(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")
    hub.state.part_bytes = 100_001
    (tmp_path / "model.bin").write_bytes(WEIGHTS)

    api.upload_file(path_or_fileobj=tmp_path / "model.bin", path_in_repo="model.bin", repo_id="org/model")

    assert hub.repo("org/model").files == {"model.bin": WEIGHTS}
    assert [put.received_bytes for put in hub.log.requests("PUT")] == [100_001, 100_001, 99_998]


def test_uploaded_folder_is_the_same_folder(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "int8convert/manifest.json": b"[]"}
    for path, data in files.items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(data)
    api = connect(hub, hub.token)
    api.create_repo("org/model")

    api.upload_folder(folder_path=tmp_path / "out", repo_id="org/model")

    assert hub.repo("org/model").files == files
    verification = api.verify_repo_checksums("org/model", local_dir=tmp_path / "out")
    assert verification.checked_count == 3 and not verification.mismatches


def test_same_bytes_are_not_sent_twice(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")
    for name in ("a.bin", "b.bin"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo=name, repo_id="org/model")
    before = hub.repo("org/model").refs["main"]

    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="a.bin", repo_id="org/model")

    assert len(hub.log.requests("PUT")) == 1
    assert hub.repo("org/model").refs["main"] == before  # the same file again: the client makes no commit
    assert hub.repo("org/model").files == {"a.bin": WEIGHTS, "b.bin": WEIGHTS}


def test_preuploaded_files_appear_with_their_commit(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")
    shards = [CommitOperationAdd(f"model-{n}.safetensors", WEIGHTS[n:]) for n in range(2)]

    for shard in shards:
        api.preupload_lfs_files("org/model", [shard])
    assert hub.repo("org/model").files == {}
    api.create_commit("org/model", shards, commit_message="shards")

    assert hub.repo("org/model").files == {"model-0.safetensors": WEIGHTS, "model-1.safetensors": WEIGHTS[1:]}


def test_commit_of_bytes_that_never_came_is_refused(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")
    shard = CommitOperationAdd("model.safetensors", WEIGHTS)
    api.preupload_lfs_files("org/model", [shard])
    hub.state.blobs.path(shard.upload_info.sha256.hex()).unlink()

    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit("org/model", [shard], commit_message="shard")


def test_deleted_file_and_folder_are_gone(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", {"a.txt": b"a", "old/b.txt": b"b", "old/c.txt": b"c", "d.txt": b"d"})
    api = connect(hub, hub.token)

    api.create_commit(
        "org/model", [CommitOperationDelete("a.txt"), CommitOperationDelete("old/")], commit_message="tidy"
    )

    assert hub.repo("org/model").files == {"d.txt": b"d"}


def test_commit_on_a_branch_that_moved_is_refused(hub: Hub, connect: Connect) -> None:
    repository = hub.add_repo("org/model", {"a.txt": b"a"})
    seen = repository.refs["main"]
    repository.add_files({"a.txt": b"b"})

    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        connect(hub, hub.token).upload_file(
            path_or_fileobj=b"c", path_in_repo="a.txt", repo_id="org/model", parent_commit=seen
        )


def test_upload_to_a_branch_leaves_main_alone(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", {"a.txt": b"a"})
    api = connect(hub, hub.token)

    api.create_branch("org/model", branch="int8")
    api.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="org/model", revision="int8")

    assert hub.repo("org/model").files == {"a.txt": b"a"}
    assert hub.repo("org/model").files_at("int8") == {"a.txt": b"a", "b.txt": b"b"}


def test_pull_request_holds_the_files_and_main_does_not(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", {"a.txt": b"a"})

    for number, token in enumerate((hub.token, hub.stranger_token), start=1):
        commit = connect(hub, token).upload_file(
            path_or_fileobj=WEIGHTS[number:], path_in_repo="m.bin", repo_id="org/model", create_pr=True
        )
        assert (commit.pr_num, commit.pr_revision) == (number, f"refs/pr/{number}")
        assert hub.repo("org/model").files_at(f"refs/pr/{number}") == {"a.txt": b"a", "m.bin": WEIGHTS[number:]}
    assert hub.repo("org/model").files == {"a.txt": b"a"}


def test_token_of_an_upload_goes_to_the_hub_only(hub: Hub, connect: Connect) -> None:
    api = connect(hub, hub.token)
    api.create_repo("org/model")
    hub.state.part_bytes = 200_000
    for size in (100_000, 300_000):
        api.upload_file(path_or_fileobj=WEIGHTS[:size], path_in_repo=f"{size}.bin", repo_id="org/model")

    to_storage = hub.log.requests(origin=Origin.STORAGE)
    assert [request.received_bytes for request in to_storage] == [100_000, 200_000, 100_000]
    assert not any(request.has_authorization or request.carries_token for request in to_storage)
