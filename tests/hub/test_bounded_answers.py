"""A server that names no end, or lists what no repository holds: two lines, after so many bytes and requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from int8convert.errors import CorruptFileError, HubConnectionError, HubError
from int8convert.hub import bounded_answer, repository, retry
from int8convert.hub.local_copy import is_too_long
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import find_repository
from int8convert.hub.small_files import discard_cached, fetch_small_files

COMMIT = "c" * 40
INFO = {"id": "org/name", "sha": COMMIT, "private": False}
FILE = {"type": "file", "path": "config.json", "size": 3, "oid": "0" * 40}

Answer = Callable[[httpx2.Request], httpx2.Response]
Serve = Callable[[Answer], list[httpx2.Request]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Have all requests to the Hub answered by a function; returns the list of those that come."""

    def run(answer: Answer) -> list[httpx2.Request]:
        asked: list[httpx2.Request] = []

        def note(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            return answer(request)

        client = httpx2.Client(transport=httpx2.MockTransport(note), follow_redirects=True)
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: client)
        monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: client)
        return asked

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.test")
    monkeypatch.setattr(retry, "CALL_RETRY_S", 0.0)
    yield run


def listing(answer: Callable[[int], Any], next_query: Callable[[int], str | None]) -> Answer:
    """A Hub whose list of files has pages: the content and the query of the next one, by number."""
    pages = iter(range(10**9))

    def respond(request: httpx2.Request) -> httpx2.Response:
        if "/tree/" not in request.url.path:
            return httpx2.Response(200, json=INFO)
        n = next(pages)
        query = next_query(n)
        headers = {"Link": f'<http://hub.test/elsewhere?{query}>; rel="next"'} if query else {}
        return httpx2.Response(200, json=answer(n), headers=headers)

    return respond


def named(n: int) -> dict[str, Any]:
    return {**FILE, "path": f"file-{n}"}


def test_list_of_several_pages_is_read_to_its_end(serve: Serve) -> None:
    asked = serve(
        listing(lambda n: [named(n), {"type": "directory", "path": "x"}], lambda n: "c=1" if n == 0 else None)
    )
    assert sorted(find_repository("org/name").files) == ["file-0", "file-1"]
    assert [str(request.url) for request in asked] == [
        "http://hub.test/api/models/org/name",
        f"http://hub.test/api/models/org/name/tree/{COMMIT}?recursive=true",
        f"http://hub.test/api/models/org/name/tree/{COMMIT}?c=1",
    ]


@pytest.mark.parametrize("query", ["cursor=same", "recursive=true"])
def test_page_that_comes_again_ends_the_list(serve: Serve, query: str) -> None:
    asked = serve(listing(lambda n: [FILE], lambda n: query))
    with pytest.raises(HubError, match="the list of files of 'org/name' repeats a page"):
        find_repository("org/name")
    assert len(asked) <= 3


@pytest.mark.parametrize("empty", [True, False])
def test_pages_without_end_are_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    monkeypatch.setattr(repository, "MAX_PAGES", 7)
    monkeypatch.setattr(repository, "MAX_FILES", 20)
    asked = serve(listing(lambda n: [] if empty else [named(8 * n + i) for i in range(8)], lambda n: f"cursor={n}"))
    with pytest.raises(HubError, match="has more than 20 files"):
        find_repository("org/name")
    assert len(asked) == (8 if empty else 4)


@pytest.mark.parametrize("place", ["info", "list", "error"])
def test_body_without_end_is_read_to_the_bound(serve: Serve, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(bounded_answer, "MAX_ANSWER_BYTES", 1 << 20)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b"["
        while True:
            sent += 1 << 16
            yield b" " * (1 << 16)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if place != "list" or "/tree/" in request.url.path:
            return httpx2.Response(400 if place == "error" else 200, content=endless())
        return httpx2.Response(200, json=INFO)

    serve(answer)
    match = "answered with status 400" if place == "error" else "the server's answer has more than 1,048,576 bytes"
    with pytest.raises(HubError, match=match):
        find_repository("org/name")
    assert sent <= (1 << 20) + (1 << 17)


@pytest.mark.parametrize(
    "entries",
    [
        {"error": "x"},
        [3],
        [{}],
        [{**FILE, "size": -1}],
        [{**FILE, "size": "3"}],
        [{**FILE, "size": 1 << 70}],
        [{**FILE, "path": "../outside"}],
        [{**FILE, "path": "/etc/passwd"}],
        [{**FILE, "path": "1_Pooling/../../x"}],
        [{**FILE, "path": "a\x1b[2Jb"}],
        [{**FILE, "path": ""}],
        [{**FILE, "oid": None}],
        [{**FILE, "lfs": {"oid": "../x"}}],
    ],
)
def test_list_of_what_no_repository_holds_is_refused(serve: Serve, entries: Any) -> None:
    serve(listing(lambda n: entries, lambda n: None))
    with pytest.raises(HubConnectionError, match="the answer is incomplete, or not one of the Hub's"):
        find_repository("org/name")


@pytest.mark.parametrize(
    "info", [[], {}, {**INFO, "id": 3}, {**INFO, "id": "../x/y"}, {**INFO, "sha": "../../x"}, {**INFO, "sha": 3}, None]
)
def test_repository_that_is_none_is_refused(serve: Serve, info: Any) -> None:
    asked = serve(lambda request: httpx2.Response(200, content=json.dumps(info).encode()))
    with pytest.raises(HubError):
        find_repository("org/name")
    assert all("/tree/" not in request.url.path for request in asked)


def test_revision_is_one_part_of_the_address(serve: Serve) -> None:
    asked = serve(listing(lambda n: [FILE], lambda n: None))
    find_repository("org/name", "refs/pr/1?x=../..")
    assert asked[0].url.raw_path == b"/api/models/org/name/revision/refs%2Fpr%2F1%3Fx%3D..%2F.."


def test_small_file_without_end_is_not_fetched_without_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b" " * (1 << 20)

    def answer(request: httpx2.Request) -> httpx2.Response:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{"0" * 40}"'}
        if request.method == "HEAD":
            return httpx2.Response(200, headers={**headers, "Content-Length": "3"})
        return httpx2.Response(200, headers=headers, content=endless())

    serve(answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    file = HubFile("org/name", "c" * 40, "config.json", 3, None, "0" * 40)
    found = repository.Repository("org/name", COMMIT, COMMIT, False, {"config.json": file})
    with pytest.raises(CorruptFileError, match="came 3 times with other bytes than the Hub lists"):
        fetch_small_files(found, ["config.json"], tmp_path)
    assert sent <= 3 * (30 << 20)


def test_small_file_that_is_large_is_not_fetched(serve: Serve, tmp_path: Path) -> None:
    asked = serve(lambda request: httpx2.Response(200))
    files = {"config.json": HubFile("org/name", "c" * 40, "config.json", 200_000_001, None, "0" * 40)}
    with pytest.raises(CorruptFileError, match="has 200,000,001 bytes, expected at most 200,000,000"):
        fetch_small_files(repository.Repository("org/name", COMMIT, COMMIT, False, files), ["config.json"], tmp_path)
    assert not asked


def test_file_may_be_fetched_twice_and_no_more() -> None:
    assert [is_too_long(n, 10_000_000) for n in (10_000_000, 20_000_000, 21_100_000)] == [False, False, True]


@pytest.mark.parametrize("place", ["blob", "shared blob", "elsewhere", "file"])
def test_wrong_file_is_removed_from_the_cache_and_from_nowhere_else(tmp_path: Path, place: str) -> None:
    path = tmp_path / "hub/models--org--name/snapshots" / COMMIT / "1_Pooling/config.json"
    targets = {
        "blob": tmp_path / "hub/models--org--name/blobs/x",
        "shared blob": tmp_path / "hub/blobs/ab/x",
        "elsewhere": tmp_path / "private",
        "file": path,
    }
    target = targets[place]
    for folder in (path.parent, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    target.write_text("x")
    if target != path:
        path.symlink_to(target)
    discard_cached(path)
    assert not path.is_symlink() and not path.exists()
    assert target.exists() == (place == "elsewhere")
