"""Each fault shows to the unmodified client as what it is.

Where the client mends it, the bytes are compared; where it does not, the exception is its own. These are also facts
about the client that a tool built on it has to know.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError

from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

WEIGHTS = random.Random(8).randbytes(500_000)
LONG = random.Random(9).randbytes(11 * 2**20)
"""Longer than the 10 MiB that the client collects before it writes: what it has not written, it fetches again."""


@pytest.fixture
def model(hub: Hub) -> Hub:
    hub.add_repo("org/model", {"model.safetensors": WEIGHTS, "long.bin": LONG})
    return hub


def download(connect: Connect, hub: Hub, path: str = "model.safetensors", **options: Any) -> bytes:
    return Path(connect(hub, **options).hf_hub_download("org/model", path)).read_bytes()


def test_cut_ends_the_body_at_that_byte_and_the_client_goes_on_from_there(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.CUT, origin=Origin.STORAGE, after_bytes=10 * 2**20 + 5)

    assert download(connect, model, "long.bin") == LONG

    first, second = model.log.requests("GET", origin=Origin.STORAGE)
    assert (first.fault, first.sent_bytes, first.range) == (FaultKind.CUT, 10 * 2**20 + 5, None)
    assert (second.status, second.range, second.sent_bytes) == (206, f"bytes={10 * 2**20}-", 2**20)


def test_cut_before_the_answer_brings_none(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.CUT, path="/api/models/", after_bytes=0)

    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        connect(model).model_info("org/model")
    assert model.log.requests()[0].status is None


def test_reset_is_an_error_the_client_does_not_mend(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.RESET, origin=Origin.STORAGE, after_bytes=200_000)

    with pytest.raises(httpx2.ReadError):
        download(connect, model)
    assert [request.sent_bytes for request in model.log.requests("GET", origin=Origin.STORAGE)] == [200_000]


def test_stall_longer_than_the_timeout_ends_the_attempt(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.STALL, origin=Origin.STORAGE, after_bytes=200_000, seconds=2)

    assert download(connect, model, timeout_s=1) == WEIGHTS

    stalled, whole = model.log.requests("GET", origin=Origin.STORAGE)
    assert (stalled.sent_bytes, whole.sent_bytes) == (200_000, len(WEIGHTS))


def test_stall_shorter_than_the_timeout_only_takes_time(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.STALL, origin=Origin.STORAGE, after_bytes=200_000, seconds=0.5)
    start = time.monotonic()

    assert download(connect, model) == WEIGHTS

    assert time.monotonic() - start > 0.5
    assert len(model.log.requests("GET", origin=Origin.STORAGE)) == 1


def test_wrong_bytes_pass_the_client_unseen_but_not_its_checksums(model: Hub, connect: Connect, tmp_path: Path) -> None:
    model.faults.add(FaultKind.WRONG_BYTES, path="objects", after_bytes=123_456)
    api = connect(model)

    got = Path(api.hf_hub_download("org/model", "model.safetensors", local_dir=tmp_path / "local")).read_bytes()

    assert [place for place in range(len(WEIGHTS)) if got[place] != WEIGHTS[place]] == list(range(123_456, 123_472))
    assert len(got) == len(WEIGHTS)
    (mismatch,) = api.verify_repo_checksums("org/model", local_dir=tmp_path / "local").mismatches
    assert mismatch["path"] == "model.safetensors"


def test_truncated_body_fails_the_clients_check_of_the_size(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.TRUNCATED, origin=Origin.STORAGE, after_bytes=123_456)

    with pytest.raises(OSError, match="should be of size 500000 but has size 123456"):
        download(connect, model)


def test_ignored_range_brings_the_whole_file_and_the_client_starts_again(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.CUT, path="objects", after_bytes=10 * 2**20 + 5)
    model.faults.add(FaultKind.RANGE_IGNORED, path="objects")

    assert download(connect, model, "long.bin") == LONG

    _, second = model.log.requests("GET", "objects")
    assert (second.range, second.status, second.sent_bytes) == (f"bytes={10 * 2**20}-", 200, len(LONG))


def test_ignored_range_gives_the_file_system_wrong_bytes(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.RANGE_IGNORED, path="objects", times=math.inf)
    connect(model)

    with HfFileSystem(endpoint=model.endpoint, token=False, skip_instance_cache=True).open(
        "org/model/model.safetensors", "rb", block_size=1000
    ) as file:
        file.seek(150_000)
        assert file.read(500) == WEIGHTS[:500]


def test_too_many_requests_are_waited_for_as_long_as_told(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.TOO_MANY_REQUESTS, origin=Origin.STORAGE, seconds=1)
    start = time.monotonic()

    assert download(connect, model) == WEIGHTS

    assert time.monotonic() - start > 1
    assert [request.status for request in model.log.requests("GET", origin=Origin.STORAGE)] == [429, 200]


def test_unavailable_is_mended_by_the_client_in_a_listing_but_not_in_a_download(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.UNAVAILABLE, path="/tree/")
    model.faults.add(FaultKind.UNAVAILABLE, origin=Origin.STORAGE)

    assert len(list(connect(model).list_repo_tree("org/model"))) == 2
    with pytest.raises(HfHubHTTPError) as error:
        download(connect, model)
    assert error.value.response.status_code == 503


def test_expired_url_is_refused_in_the_words_of_the_object_store(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.URL_EXPIRED)

    with pytest.raises(HfHubHTTPError, match="<Message>Request has expired</Message>") as error:
        download(connect, model)
    assert error.value.response.status_code == 403
    assert download(connect, model) == WEIGHTS  # a fresh URL


def test_restarted_server_goes_on_where_it_was(model: Hub, connect: Connect) -> None:
    model.faults.add(FaultKind.RESTART, origin=Origin.STORAGE, after_bytes=200_000, seconds=0.3)

    assert download(connect, model) == WEIGHTS

    cut, whole = model.log.requests("GET", origin=Origin.STORAGE)
    assert (cut.sent_bytes, whole.sent_bytes) == (200_000, len(WEIGHTS))


def test_nobody_listens_while_the_server_is_down(model: Hub, connect: Connect) -> None:
    api = connect(model)
    model.restart(down_s=1)

    with pytest.raises(httpx2.ConnectError):
        api.model_info("org/model")
    model.await_restart()
    assert api.model_info("org/model").id == "org/model"


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.RESET, FaultKind.UNAVAILABLE, FaultKind.RESTART])
def test_upload_broken_at_that_byte_is_sent_again_whole(hub: Hub, connect: Connect, kind: FaultKind) -> None:
    hub.faults.add(kind, method="PUT", after_bytes=123_456, seconds=0.2)
    api = connect(hub, hub.token)
    api.create_repo("org/model")

    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id="org/model")

    assert hub.repo("org/model").files == {"model.bin": WEIGHTS}
    broken, whole = hub.log.requests("PUT")
    assert (broken.fault, whole.received_bytes) == (kind, len(WEIGHTS))
    assert broken.received_bytes == (len(WEIGHTS) if kind is FaultKind.UNAVAILABLE else 123_456)


def test_stalled_upload_arrives_late(hub: Hub, connect: Connect) -> None:
    hub.faults.add(FaultKind.STALL, method="PUT", after_bytes=123_456, seconds=0.3)
    api = connect(hub, hub.token)
    api.create_repo("org/model")

    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id="org/model")

    assert hub.repo("org/model").files == {"model.bin": WEIGHTS}
    assert [put.received_bytes for put in hub.log.requests("PUT")] == [len(WEIGHTS)]


def test_commit_is_not_tried_again_and_nothing_is_committed(hub: Hub, connect: Connect) -> None:
    hub.faults.add(FaultKind.UNAVAILABLE, path="/commit/")
    api = connect(hub, hub.token)
    api.create_repo("org/model")

    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id="org/model")
    assert error.value.response.status_code == 503
    assert hub.repo("org/model").files == {}
