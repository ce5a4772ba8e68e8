"""What the client never asks for, the object store refuses: asked by plain HTTP."""

from __future__ import annotations

import hashlib

import httpx2
import pytest

from tests.tools.hub_server.http_messages import Origin
from tests.tools.hub_server.hub import Hub

DATA = bytes(range(256)) * 10
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def object_url(hub: Hub) -> str:
    hub.add_repo("org/model", {"model.bin": DATA})
    return hub.state.urls.sign(hub.state.endpoint(Origin.STORAGE), f"/objects/{SHA256}")


def test_unsigned_url_is_refused(object_url: str) -> None:
    assert httpx2.get(object_url).content == DATA
    assert httpx2.get(object_url.split("?")[0]).status_code == 403
    assert httpx2.get(object_url.replace("Expires=1", "Expires=2")).status_code == 403


def test_bytes_of_another_sha256_are_refused(hub: Hub, object_url: str) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    signed = hub.state.urls.sign(hub.state.endpoint(Origin.STORAGE), f"/objects/{other}")

    assert httpx2.put(signed, content=b"not the other").status_code == 400
    assert not hub.state.blobs.has(other)
    assert httpx2.put(signed, content=b"other").status_code == 200
    assert hub.state.blobs.path(other).read_bytes() == b"other"


@pytest.mark.parametrize(
    ("asked", "expected", "content_range"),
    [
        ("bytes=0-0", DATA[:1], "bytes 0-0/2560"),
        ("bytes=100-199", DATA[100:200], "bytes 100-199/2560"),
        ("bytes=2000-", DATA[2000:], "bytes 2000-2559/2560"),
        ("bytes=2000-9999", DATA[2000:], "bytes 2000-2559/2560"),
        ("bytes=-7", DATA[-7:], "bytes 2553-2559/2560"),
    ],
)
def test_range_brings_those_bytes(object_url: str, asked: str, expected: bytes, content_range: str) -> None:
    answer = httpx2.get(object_url, headers={"Range": asked})

    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"] == content_range


def test_range_behind_the_end_is_refused(object_url: str) -> None:
    answer = httpx2.get(object_url, headers={"Range": "bytes=2560-"})

    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */2560")


def test_each_origin_has_its_own_paths(hub: Hub, object_url: str) -> None:
    on_hub = object_url.replace(Origin.STORAGE, Origin.HUB)
    on_storage = f"{hub.state.endpoint(Origin.STORAGE)}/api/models/org/model"

    assert httpx2.get(on_hub).status_code == 404
    assert httpx2.get(on_storage).status_code == 404
    assert httpx2.get(f"{hub.endpoint}/api/models/org/model").status_code == 200


def test_answers_follow_each_other_on_one_connection(hub: Hub, object_url: str) -> None:
    """Also after a body that no route has read."""
    with httpx2.Client() as client:
        assert client.post(f"{hub.endpoint}/nowhere", content=DATA).status_code == 404
        assert client.head(object_url).headers["Content-Length"] == "2560"
        assert client.get(object_url).content == DATA
    assert [request.received_bytes for request in hub.log.requests()] == [2560, 0, 0]
