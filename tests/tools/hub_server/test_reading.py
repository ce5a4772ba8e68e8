"""What the unmodified client reads is what was put there."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from tests.tools.hub_server.blobs import KnownFile
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

WEIGHTS = random.Random(8).randbytes(300_000)
FILES = {"config.json": b'{"model_type": "opt"}\n', "onnx/notes.txt": b"hello", "model.safetensors": WEIGHTS}


def git_oid(data: bytes) -> str:
    """As `git hash-object` has it."""
    return subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True).stdout.decode().strip()


def test_downloaded_file_is_the_one_put_there(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)

    for path, data in FILES.items():
        assert Path(api.hf_hub_download("org/model", path)).read_bytes() == data


def test_lfs_file_comes_from_the_other_origin_and_git_file_from_the_hub(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)

    api.hf_hub_download("org/model", "model.safetensors")
    api.hf_hub_download("org/model", "config.json")

    assert hub.log.sent_bytes(origin=Origin.STORAGE) == len(WEIGHTS)
    (git_file,) = hub.log.requests("GET", "/api/resolve-cache/models/org/model/.*/config.json", Origin.HUB)
    assert git_file.sent_bytes == len(FILES["config.json"])


def test_token_goes_to_the_hub_only(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)

    connect(hub, hub.token).snapshot_download("org/model")

    to_storage = hub.log.requests(origin=Origin.STORAGE)
    assert len(to_storage) == 1
    assert not any(request.has_authorization or request.carries_token for request in to_storage)
    assert all(request.has_authorization and request.carries_token for request in hub.log.requests(origin=Origin.HUB))


def test_log_tells_a_token_at_the_wrong_origin(hub: Hub, connect: Connect) -> None:
    repository = hub.add_repo("org/model", FILES)
    sha256 = repository.find("main").tree["model.safetensors"].sha256
    connect(hub)
    signed = hub.state.urls.sign(hub.state.endpoint(Origin.STORAGE), f"/objects/{sha256}")

    import httpx2

    answer = httpx2.get(signed, headers={"Authorization": f"Bearer {hub.token}"})

    assert answer.status_code == 400
    assert hub.log.requests(origin=Origin.STORAGE)[0].carries_token


def test_model_info_pins_the_commit_and_lists_sizes_and_sha256(hub: Hub, connect: Connect) -> None:
    repository = hub.add_repo("org/model", FILES)

    info = connect(hub).model_info("org/model", files_metadata=True)

    assert info.sha == repository.refs["main"]
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert {path: sibling.size for path, sibling in siblings.items()} == {p: len(d) for p, d in FILES.items()}
    weights = siblings["model.safetensors"].lfs
    assert weights is not None and weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert siblings["config.json"].blob_id == git_oid(FILES["config.json"])


def test_tree_names_files_and_folders(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)

    top = {entry.path: entry for entry in api.list_repo_tree("org/model")}
    whole = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}

    assert set(top) == {"config.json", "model.safetensors", "onnx"}
    assert isinstance(top["onnx"], RepoFolder)
    assert set(whole) == {*FILES, "onnx"}
    weights = whole["model.safetensors"]
    assert isinstance(weights, RepoFile) and weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert [entry.path for entry in api.list_repo_tree("org/model", "onnx")] == ["onnx/notes.txt"]


def test_tree_of_many_files_comes_in_pages(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", {f"{number:03d}.txt": b"" for number in range(25)})
    hub.state.page_entries = 10

    listed = [entry.path for entry in connect(hub).list_repo_tree("org/model")]

    assert listed == [f"{number:03d}.txt" for number in range(25)]
    assert len(hub.log.requests("GET", "/tree/")) == 3


def test_paths_info_tells_only_what_exists(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)

    found = connect(hub).get_paths_info("org/model", ["onnx", "config.json", "nowhere"])

    assert [entry.path for entry in found] == ["onnx", "config.json"]


def test_snapshot_is_whole_and_its_checksums_are_right(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)

    api.snapshot_download("org/model", local_dir=tmp_path / "local")

    assert {path: (tmp_path / "local" / path).read_bytes() for path in FILES} == FILES
    verification = api.verify_repo_checksums("org/model", local_dir=tmp_path / "local")
    assert verification.checked_count == 3
    assert not (verification.mismatches or verification.missing_paths or verification.extra_paths)


def test_checksums_of_a_changed_file_are_wrong(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub)
    api.snapshot_download("org/model", local_dir=tmp_path / "local")
    (tmp_path / "local" / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")

    (mismatch,) = api.verify_repo_checksums("org/model", local_dir=tmp_path / "local").mismatches

    assert mismatch["path"] == "model.safetensors"
    assert mismatch["expected"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_pinned_commit_stays_while_main_moves_on(hub: Hub, connect: Connect) -> None:
    repository = hub.add_repo("org/model", FILES)
    pinned = repository.refs["main"]
    repository.add_files({"config.json": b"{}"})
    api = connect(hub)

    assert Path(api.hf_hub_download("org/model", "config.json")).read_bytes() == b"{}"
    old = api.hf_hub_download("org/model", "config.json", revision=pinned)
    assert Path(old).read_bytes() == FILES["config.json"]
    assert [commit.commit_id for commit in api.list_repo_commits("org/model")][1] == pinned


def test_range_request_brings_that_range(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    connect(hub)

    with HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True).open(
        "org/model/model.safetensors", "rb", block_size=1000
    ) as file:
        file.seek(150_000)
        data = file.read(500)

    assert data == WEIGHTS[150_000:150_500]
    assert hub.log.sent_bytes(origin=Origin.STORAGE) < 3000
    assert {request.status for request in hub.log.requests("GET", origin=Origin.STORAGE)} == {206}


def test_file_of_the_test_is_served_where_it_lies(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHTS)
    hub.add_repo("org/model", {"pytorch_model.bin": tmp_path / "weights.bin"})

    downloaded = connect(hub).hf_hub_download("org/model", "pytorch_model.bin")

    assert Path(downloaded).read_bytes() == WEIGHTS
    assert hub.repo("org/model").files == {"pytorch_model.bin": WEIGHTS}


def test_sparse_file_of_known_sha256_is_listed_at_its_full_size(hub: Hub, connect: Connect, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(60 * 2**30)
    hub.add_repo("org/huge", {"model.safetensors": KnownFile(tmp_path / "huge", "ab" * 32)})

    (entry,) = connect(hub).list_repo_tree("org/huge")

    assert isinstance(entry, RepoFile) and entry.lfs is not None
    assert (entry.size, entry.lfs.sha256) == (60 * 2**30, "ab" * 32)


def test_what_is_not_there_is_told_apart(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    api = connect(hub, hub.token)

    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nowhere")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model", revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("org/model", "nowhere.json")


def test_signed_url_expires(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    hub.state.urls.lifetime_s = -1

    with pytest.raises(HfHubHTTPError, match="Request has expired"):
        connect(hub).hf_hub_download("org/model", "model.safetensors")


def test_slow_line_takes_its_time(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    hub.bandwidth.bytes_per_s = 600_000
    start = time.monotonic()

    downloaded = connect(hub).hf_hub_download("org/model", "model.safetensors")

    assert time.monotonic() - start > 0.45  # 300 kB at 600 kB/s
    assert Path(downloaded).read_bytes() == WEIGHTS


def test_module_functions_reach_the_hub_too(hub: Hub, connect: Connect) -> None:
    hub.add_repo("org/model", FILES)
    connect(hub)

    assert Path(snapshot_download("org/model"), "config.json").read_bytes() == FILES["config.json"]


def test_process_of_its_own_reaches_the_hub_by_its_environment(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    script = "from huggingface_hub import hf_hub_download as d; print(d('org/model', 'model.safetensors'), end='')"
    environment = os.environ | hub.client_environment(hub.token)

    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert Path(done.stdout).read_bytes() == WEIGHTS
    assert all(request.has_authorization for request in hub.log.requests(origin=Origin.HUB))
