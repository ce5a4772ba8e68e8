"""The object store behind the Hub: signed URLs, no accounts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.tools.hub_server.http_messages import FileSlice, Refusal, Request, Response, StorageRefusal, json_response
from tests.tools.hub_server.server_state import ServerState

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def object_path(sha256: str) -> str:
    return f"/objects/{sha256}"


def part_path(sha256: str, number: int) -> str:
    return f"/objects/{sha256}/parts/{number}"


def completion_path(sha256: str) -> str:
    """On the Hub: the client sends no token there, so it is signed too."""
    return f"/api/complete-multipart/{sha256}"


def get_object(state: ServerState, request: Request, sha256: str) -> Response:
    _check(state, request)
    try:
        path = state.blobs.path(sha256)
    except KeyError:
        raise StorageRefusal(404, "NoSuchKey", "The specified key does not exist.") from None
    return serve_file(path, request, {"ETag": f'"{sha256}"'})


def put_object(state: ServerState, request: Request, sha256: str) -> Response:
    _check(state, request)
    if not state.blobs.receive(sha256, request.chunks()):
        raise StorageRefusal(400, "BadDigest", "The sha256 you specified did not match what was received.")
    return Response(200, headers={"ETag": f'"{sha256[:32]}"'})


def put_part(state: ServerState, request: Request, sha256: str, number: str) -> Response:
    _check(state, request)
    etag = state.blobs.receive_part(sha256, int(number), request.chunks())
    return Response(200, headers={"ETag": f'"{etag}"'})


def complete_multipart(state: ServerState, request: Request, sha256: str) -> Response:
    state.urls.check(request.path, request.query)
    numbers = [part["partNumber"] for part in request.read_json()["parts"]]
    if not state.blobs.join_parts(sha256, sorted(numbers)):
        raise Refusal(400, None, "The parts are not all there, or their sha256 is not the one announced.")
    return json_response({"success": True})


def serve_file(path: Path, request: Request, headers: Mapping[str, str]) -> Response:
    """A file, or the one Range of it that was asked for; several ranges are answered by the whole file, as is allowed.

    Raises:
        StorageRefusal: 416, the range begins behind the end.
    """
    size = path.stat().st_size
    whole = FileSlice(path, 0, size)
    headers = {**headers, "Accept-Ranges": "bytes"}
    asked = _RANGE.fullmatch(request.headers.get("Range") or "")
    if asked is None or not (asked[1] or asked[2]):
        return Response(200, whole, headers, "application/octet-stream")
    start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    end = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if start >= size or end < start:
        raise StorageRefusal(416, "InvalidRange", "The range is not satisfiable", {"Content-Range": f"bytes */{size}"})
    part = FileSlice(path, start, end - start + 1)
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Response(206, part, headers, "application/octet-stream", whole)


def _check(state: ServerState, request: Request) -> None:
    state.urls.check(request.path, request.query)
    if request.headers.get("Authorization"):
        raise StorageRefusal(400, "InvalidArgument", "Only one auth mechanism allowed; a signed URL is one.")
