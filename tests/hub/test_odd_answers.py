"""Answers the Hub itself never gives, but proxies, caches and stores on the way do: each is seen for what it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from int8convert.errors import HubAccessError, HubConnectionError, HubError
from int8convert.hub import remote_file, retry
from int8convert.hub.remote_file import HubFile

CONTENT = bytes(range(256)) * 4
FILE = HubFile("org/name", "c" * 40, "model.safetensors", len(CONTENT), None, "")
Answer = Callable[[httpx2.Request], httpx2.Response]
Serve = Callable[..., list[httpx2.Request]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Have requests to the store behind the Hub answered by these functions in turn, the last one for ever."""
    clients: list[httpx2.Client] = []

    def run(*answers: Answer, at_hub: bool = False) -> list[httpx2.Request]:
        asked: list[httpx2.Request] = []

        def answer(request: httpx2.Request) -> httpx2.Response:
            if request.url.host == "hub.test" and not at_hub:
                return httpx2.Response(302, headers={"Location": "http://store.test/object?Signature=s"})
            asked.append(request)
            return answers[min(len(asked), len(answers)) - 1](request)

        clients.append(httpx2.Client(transport=httpx2.MockTransport(answer)))
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: clients[-1])
        return asked

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.test")
    template = "http://hub.test/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "CALL_RETRY_S", 0.2)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "0.2")
    yield run
    for client in clients:
        client.close()


def part(request: httpx2.Request) -> httpx2.Response:
    """The range, as asked for."""
    begin, end = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
    headers = {"Content-Range": f"bytes {begin}-{end}/{len(CONTENT)}"}
    return httpx2.Response(206, headers=headers, content=iter([CONTENT[begin : end + 1]]))


def saying(status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> Answer:
    return lambda request: httpx2.Response(status, headers=headers, content=iter([content]))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("at_hub", [True, False])
def test_status_that_passes_is_tried_again(serve: Serve, status: int, at_hub: bool) -> None:
    asked = serve(saying(status), part, at_hub=at_hub)
    assert FILE.read_range(100, 50) == CONTENT[100:150]
    assert len(asked) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusal_of_the_store_is_one_of_an_old_address(serve: Serve, status: int) -> None:
    """Whatever the store says to an address that has run out, the next one may be right."""
    asked = serve(saying(status), part)
    assert FILE.read_range(100, 50) == CONTENT[100:150]
    assert len(asked) == 2


def test_answer_for_another_range_is_not_taken_for_the_one_asked_for(serve: Serve) -> None:
    headers = {"Content-Range": f"bytes 0-49/{len(CONTENT)}"}
    asked = serve(saying(206, headers, CONTENT[:50]), saying(206, {}, CONTENT[:50]), part)
    assert FILE.read_range(100, 50) == CONTENT[100:150]
    assert len(asked) == 3


def test_file_of_another_size_is_told(serve: Serve) -> None:
    serve(saying(206, {"Content-Range": "bytes 100-149/7777"}, CONTENT[100:150]))
    with pytest.raises(HubConnectionError, match="the server's file has 7777 bytes, the Hub lists 1024"):
        FILE.read_range(100, 50)


def test_range_behind_the_end_of_a_shorter_file_is_tried_again_and_told(serve: Serve) -> None:
    serve(saying(416, {"Content-Range": "bytes */10"}))
    with pytest.raises(HubConnectionError, match="the server's file has fewer bytes than the Hub lists"):
        FILE.read_range(100, 50)


def test_encoded_answer_is_refused_though_none_was_asked_for(serve: Serve) -> None:
    asked = serve(saying(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"))
    with pytest.raises(HubError, match="the server's encoding is 'gzip', expected none, as requested"):
        FILE.read_range(100, 50)
    assert [request.headers["Accept-Encoding"] for request in asked] == ["identity"]


def test_whole_file_in_many_pieces_for_a_range_is_skipped_to_its_place(serve: Serve) -> None:
    serve(lambda request: httpx2.Response(200, content=iter([CONTENT[i : i + 30] for i in range(0, 1024, 30)])))
    assert FILE.read_range(100, 50) == CONTENT[100:150]
    with FILE.stream(61, 1024) as pieces:
        assert b"".join(pieces) == CONTENT[61:]


def test_no_gigabytes_are_skipped_for_a_small_range(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "_MAX_READ_AHEAD", 99)
    serve(saying(200, {}, CONTENT))
    with pytest.raises(HubConnectionError, match="the server ignores Range requests"):
        FILE.read_range(100, 50)


@pytest.mark.parametrize(("remaining", "reset_s"), [(0, 1), (7, 60)])
def test_rate_limit_without_retry_after_is_waited_for_if_it_is_used_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, remaining: int, reset_s: int
) -> None:
    serve(saying(429, {"ratelimit": f'"api";r={remaining};t={reset_s}'}), part, at_hub=True)
    monkeypatch.setenv("INT8CONVERT_HUB_RETRY_SECONDS", "100")
    began = time.monotonic()
    assert FILE.read_range(100, 50) == CONTENT[100:150]
    assert (time.monotonic() - began >= reset_s) is (remaining == 0)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            saying(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}),
            HubError,
            "'org/name' no longer has a file that it listed",
        ),
        (
            saying(403, {"X-Error-Message": "Access to this resource is disabled."}),
            HubError,
            "'org/name' is disabled",
        ),
        (
            saying(403, {"X-Error-Message": "no\x1b[31m red" + "x" * 500}),
            HubAccessError,
            "the Hub forbids the request: 'no\\x1b[31m red",
        ),
    ],
)
def test_refusal_of_the_hub_is_told_in_its_own_line(
    serve: Serve, answer: Answer, kind: type[HubError], message: str
) -> None:
    """Never with what a server may have put into its words to reach the terminal."""
    asked = serve(answer, at_hub=True)
    with pytest.raises(kind) as caught:
        FILE.read_range(100, 50)
    assert caught.value.message.startswith(message)
    assert caught.value.message.isprintable() and len(caught.value.message) < 250
    assert len(asked) == 1


def test_proxy_that_refuses_is_named(serve: Serve) -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ProxyError("502 Bad Gateway", request=request)

    serve(refuse)
    with pytest.raises(HubConnectionError, match="the proxy refused: '502 Bad Gateway'"):
        FILE.read_range(100, 50)
