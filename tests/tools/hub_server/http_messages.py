"""What the transport hands to a route and gets back: no sockets here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from enum import StrEnum
from pathlib import Path
from typing import Any


class Origin(StrEnum):
    """Which of the two servers a client believes to talk to, by the Host it names."""

    HUB = "127.0.0.1"
    STORAGE = "localhost"


@dataclass(frozen=True)
class FileSlice:
    """`n_bytes` of a file from `start` on, to be sent without being read into memory."""

    path: Path
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Response:
    """An answer; `body` is sent only where the method allows one."""

    status: int
    body: bytes | FileSlice = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    whole: FileSlice | None = None
    """Of an answer to a Range: the file it is a part of, for the fault that ignores the Range."""

    @property
    def body_bytes(self) -> int:
        return self.body.n_bytes if isinstance(self.body, FileSlice) else len(self.body)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode(), headers or {})


class Refusal(Exception):
    """A request answered with an error; the client picks its exception by `code`, the header X-Error-Code."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def response(self) -> Response:
        named = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return json_response({"error": self.message}, self.status, named | self.headers)


class StorageRefusal(Refusal):
    """An error as an object store words it: XML, no Hub headers."""

    def response(self) -> Response:
        text = f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>"
        return Response(self.status, text.encode(), self.headers, "application/xml")


@dataclass(frozen=True)
class Request:
    """A request whose body is read while a route runs: `chunks()` once, or `read_json()` once."""

    method: str
    origin: Origin
    path: str
    """As sent, still quoted."""
    query: Mapping[str, str]
    headers: Message
    chunks: Callable[[], Iterator[bytes]]

    @property
    def token(self) -> str | None:
        """The bearer token, "" for an Authorization header of another kind, None for none."""
        header = self.headers.get("Authorization")
        return None if header is None else header.removeprefix("Bearer ") if header.startswith("Bearer ") else ""

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def read_json(self) -> Any:
        return json.loads(self.read())
