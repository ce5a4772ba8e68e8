"""What does not pass ends in two lines that say what, and what to do; soon, as the retry budget is short here."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

import int8convert
from int8convert.errors import HubAccessError, HubConnectionError
from int8convert.events import SourceFetched
from tests.tools.hub_conversions import READERS, convert, looks_complete
from tests.tools.hub_models import NAME, opt_66b
from tests.tools.hub_server import storage_routes
from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.fixtures import Connect
from tests.tools.hub_server.http_messages import Origin, Refusal, Response
from tests.tools.hub_server.hub import Hub
from tests.tools.hub_server.routing import ROUTES

pytestmark = pytest.mark.usefixtures("quick_waits", "map_in_process")

TIMEOUT_S = 0.3
RETRY_S = 1.0
SOON_S = 60
"""Far more than the retry budget even on a busy machine, and far less than what a server here asks for."""
AGAIN = "check the network connection, then rerun the same command"

REASONS = {
    FaultKind.CUT: "the connection broke off",
    FaultKind.RESET: "the connection broke off",
    FaultKind.STALL: "no answer within the time limit",
    FaultKind.TRUNCATED: "the answer (ended early|was too short|is incomplete, or not one of the Hub's)",
    FaultKind.TOO_MANY_REQUESTS: "status 429 of (localhost|127.0.0.1)",
    FaultKind.UNAVAILABLE: "status 503 of (localhost|127.0.0.1)",
    FaultKind.URL_EXPIRED: "status 403 of localhost, as for an expired address",
}


@pytest.fixture
def model(hub: Hub, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.setattr("int8convert.hub.retry.CALL_RETRY_S", RETRY_S)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", str(RETRY_S))
    hub.add_repo(NAME, opt_66b(tmp_path / "model"))
    connect(hub, timeout_s=TIMEOUT_S)
    return hub


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", REASONS)
def test_store_that_never_gives_a_shard(model: Hub, tmp_path: Path, kind: FaultKind, reader: str) -> None:
    model.faults.add(kind, origin=Origin.STORAGE, nth=8, times=math.inf, seconds=3, after_bytes=0)
    out = tmp_path / "out"

    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, out, reader)

    what = r"reading 'pytorch_model-00002-of-00003\.bin' of 'facebook/opt-66b' made no progress for \d+ s: "
    assert re.fullmatch(what + REASONS[kind], caught.value.message), caught.value.message
    assert caught.value.hint == AGAIN
    assert caught.value.state == "1 finished shard is kept: the same command resumes after it"
    assert not looks_complete(out)
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.incomplete"))


@pytest.mark.parametrize("kind", [kind for kind in REASONS if kind is not FaultKind.URL_EXPIRED])
def test_hub_that_never_answers(model: Hub, tmp_path: Path, kind: FaultKind) -> None:
    model.faults.add(kind, path="/api/models/", times=math.inf, seconds=3, after_bytes=0)
    began = time.monotonic()

    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, tmp_path / "out")

    what = r"looking for 'facebook/opt-66b' made no progress for \d+ s: "
    assert re.fullmatch(what + REASONS[kind], caught.value.message), caught.value.message
    assert caught.value.hint == AGAIN
    assert time.monotonic() - began < SOON_S
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("page", [1, 2])
def test_list_of_files_that_never_comes(model: Hub, tmp_path: Path, page: int) -> None:
    model.state.page_entries = 4
    model.faults.add(FaultKind.STALL, path="/tree/", nth=page, times=math.inf, seconds=3, after_bytes=10)

    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, tmp_path / "out")
    assert re.fullmatch(
        r"listing 'facebook/opt-66b' made no progress for \d+ s: no answer within the time limit", caught.value.message
    )


def test_list_of_many_pages_is_read_to_its_end(model: Hub, tmp_path: Path) -> None:
    model.state.page_entries = 3
    assert convert(NAME, tmp_path / "out")
    assert len(model.log.requests(path="/tree/")) == 4


def test_token_does_not_follow_a_list_to_another_origin(model: Hub, connect: Connect, tmp_path: Path) -> None:
    """Mirrors hand on the addresses of next pages as they got them."""
    connect(model, model.token)
    model.state.page_entries, model.state.page_origin = 3, Origin.STORAGE

    assert convert(NAME, tmp_path / "out")

    assert {request.origin for request in model.log.requests(path="/tree/")} == {Origin.HUB}
    assert not [request for request in model.log.requests(origin=Origin.STORAGE) if request.carries_token]


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.index.json"])
def test_small_file_that_never_comes(model: Hub, tmp_path: Path, name: str) -> None:
    model.faults.add(FaultKind.TRUNCATED, method="GET", path=f"/{name}$", times=math.inf, after_bytes=10)

    with pytest.raises(HubConnectionError) as caught:
        convert(NAME, tmp_path / "out")
    assert re.fullmatch(
        rf"fetching '{name}' of 'facebook/opt-66b' made no progress for \d+ s: the answer is incomplete, or not one of "
        "the Hub's",
        caught.value.message,
    )


def test_server_that_ignores_ranges_for_good_still_gives_small_shards(model: Hub, tmp_path: Path) -> None:
    expected = convert(NAME, tmp_path / "undisturbed", "stream")
    model.faults.add(FaultKind.RANGE_IGNORED, times=math.inf)
    assert convert(NAME, tmp_path / "out", "stream") == expected


def test_wait_longer_than_the_budget_asked_by_retry_after_is_not_waited(model: Hub, tmp_path: Path) -> None:
    model.faults.add(FaultKind.TOO_MANY_REQUESTS, origin=Origin.STORAGE, nth=7, times=math.inf, seconds=500)
    began = time.monotonic()

    with pytest.raises(HubConnectionError, match="status 429 of localhost"):
        convert(NAME, tmp_path / "out", "stream")
    assert time.monotonic() - began < SOON_S


def test_retry_after_is_waited(model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "10")
    model.faults.add(FaultKind.TOO_MANY_REQUESTS, origin=Origin.STORAGE, nth=7, seconds=1)
    began = time.monotonic()

    convert(NAME, tmp_path / "out", "stream")

    assert time.monotonic() - began >= 1
    assert len(model.log.requests(origin=Origin.STORAGE)) == 6 + 3 + 1


def test_download_that_always_ends_halfway_is_given_up(model: Hub, tmp_path: Path) -> None:
    """Half a shard, again and again, is no progress."""
    model.faults.add(FaultKind.TRUNCATED, method="GET", origin=Origin.STORAGE, nth=7, times=math.inf, after_bytes=9000)
    model.log.clear()

    with pytest.raises(HubConnectionError, match="the answer is incomplete"):
        convert(NAME, tmp_path / "out", "download")
    assert model.log.sent_bytes(origin=Origin.STORAGE) < 100 * 9000


def test_store_that_something_forbids_is_not_asked_for_minutes(
    model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall says 403, too, and to every new address."""
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "300")
    model.faults.add(FaultKind.URL_EXPIRED, origin=Origin.STORAGE, path="", times=math.inf)

    with pytest.raises(HubConnectionError, match="status 403 of localhost, as for an expired address"):
        int8convert.plan(NAME)
    assert len(model.log.requests("GET", origin=Origin.STORAGE)) <= 4 * 2 * 3, (
        "of three shards, at most two blocks each"
    )


def test_trouble_at_the_end_of_a_long_try_is_borne(model: Hub, tmp_path: Path) -> None:
    """An attempt that took longer than the budget before it failed is followed by another."""
    model.state.repository(NAME).add_files({"tokenizer.json": b"x" * 3_000_000})  # type: ignore[union-attr]
    model.bandwidth.bytes_per_s = 2e6
    model.faults.add(FaultKind.TRUNCATED, method="GET", path="tokenizer.json", after_bytes=2_900_000)

    int8convert.plan(NAME)

    assert len(model.log.requests("GET", "tokenizer.json")) == 2


def test_gate_that_a_mirror_on_another_host_tells_of_is_believed(
    model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(state: object, request: object, sha256: str) -> Response:
        raise Refusal(403, "GatedRepo", "Access to it is restricted")

    instead = [
        replace(route, answer=refuse) if route.answer is storage_routes.get_object else route for route in ROUTES
    ]
    monkeypatch.setattr("tests.tools.hub_server.routing.ROUTES", tuple(instead))

    with pytest.raises(HubAccessError, match="is gated"):
        convert(NAME, tmp_path / "out")
    assert len(model.log.requests("GET", origin=Origin.STORAGE)) <= 3


def test_waits_are_told_once_a_person_would_notice(
    model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("int8convert.hub.retry._MIN_LOGGED_S", 0.5)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "10")
    model.faults.add(FaultKind.UNAVAILABLE, origin=Origin.STORAGE, nth=7)
    model.faults.add(FaultKind.TOO_MANY_REQUESTS, origin=Origin.STORAGE, nth=9, seconds=1)

    convert(NAME, tmp_path / "out", "stream")

    assert [record.getMessage() for record in caplog.records if record.name.endswith("retry")] == [
        "reading 'pytorch_model-00002-of-00003.bin' of 'facebook/opt-66b': status 429 of localhost; retrying in 1 s"
    ]


@pytest.mark.parametrize("reader", READERS)
def test_error_of_whoever_is_told_of_the_progress_ends_the_conversion(model: Hub, tmp_path: Path, reader: str) -> None:
    """It is raised in a thread that others wait for."""

    def break_down(event: object) -> None:
        if isinstance(event, SourceFetched):
            raise ValueError("no more events")

    with pytest.raises(ValueError, match="no more events"):
        convert(NAME, tmp_path / "out", reader, break_down)
    assert not (tmp_path / "out").exists()


def test_access_that_is_closed_within_a_download_leaves_nothing(model: Hub, tmp_path: Path) -> None:
    """The client may hang in a request for longer than we wait for it."""
    model.faults.add(FaultKind.STALL, method="HEAD", path="00002-of", seconds=1.5, after_bytes=0)
    model.faults.add(FaultKind.CUT, origin=Origin.STORAGE, path="", nth=7, times=math.inf, after_bytes=0)
    out = tmp_path / "out"
    with pytest.raises(HubConnectionError):
        convert(NAME, out, "download")
    time.sleep(1.5)
    assert not list(out.rglob("*"))
