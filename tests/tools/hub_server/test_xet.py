"""With xet on, the client takes the bytes by hf_xet; with it off, over HTTP; they are the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd

from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

WEIGHTS = random.Random(8).randbytes(300_000)


def test_download_by_xet_asks_for_a_token_and_not_the_object_store(xet_hub: Hub, connect: Connect) -> None:
    xet_hub.add_repo("org/model", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    api = connect(xet_hub, xet_hub.token, xet=True)

    folder = api.snapshot_download("org/model")

    assert Path(folder, "model.safetensors").read_bytes() == WEIGHTS
    assert Path(folder, "config.json").read_bytes() == b"{}"
    assert xet_hub.log.requests("GET", "/xet-read-token/")
    assert not xet_hub.log.requests(origin=Origin.STORAGE)


def test_folder_uploaded_by_xet_arrives(xet_hub: Hub, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    files = {"model.safetensors": WEIGHTS, "config.json": b"{}"}
    for path, data in files.items():
        (tmp_path / "out" / path).write_bytes(data)
    api = connect(xet_hub, xet_hub.token, xet=True)
    api.create_repo("org/model")

    api.upload_folder(folder_path=tmp_path / "out", repo_id="org/model")

    assert xet_hub.repo("org/model").files == files
    assert xet_hub.log.requests("GET", "/xet-write-token/") and not xet_hub.log.requests("PUT")
    verification = api.verify_repo_checksums("org/model", local_dir=tmp_path / "out")
    assert verification.checked_count == 2 and not verification.mismatches


def test_file_preuploaded_by_xet_can_be_read_over_http(xet_hub: Hub, connect: Connect) -> None:
    api = connect(xet_hub, xet_hub.token, xet=True)
    api.create_repo("org/model")
    shard = CommitOperationAdd("model.safetensors", WEIGHTS)
    api.preupload_lfs_files("org/model", [shard])
    api.create_commit("org/model", [shard], commit_message="shard")

    downloaded = connect(xet_hub, xet_hub.token, xet=False).hf_hub_download("org/model", "model.safetensors")

    assert Path(downloaded).read_bytes() == WEIGHTS
    assert xet_hub.log.sent_bytes(origin=Origin.STORAGE) == len(WEIGHTS)


def test_pull_request_by_xet_holds_the_files(xet_hub: Hub, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(WEIGHTS)
    xet_hub.add_repo("org/model", {})

    commit = connect(xet_hub, xet_hub.token, xet=True).upload_folder(
        folder_path=tmp_path / "out", repo_id="org/model", create_pr=True
    )

    assert commit.pr_url == f"{xet_hub.endpoint}/org/model/discussions/1"
    assert xet_hub.repo("org/model").files == {}
    assert xet_hub.repo("org/model").files_at("refs/pr/1") == {"model.safetensors": WEIGHTS}


def test_upload_by_xet_to_a_hub_without_it_fails_at_the_token(hub: Hub, connect: Connect) -> None:
    pytest.importorskip("hf_xet")
    api = connect(hub, hub.token, xet=True)
    api.create_repo("org/model")

    with pytest.raises(ConnectionError, match=r"404 Not Found.*/xet-write-token/"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="org/model")
    assert hub.repo("org/model").files == {}
