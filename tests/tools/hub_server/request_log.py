"""Every request the server got, in the order they began."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from typing import Any

from tests.tools.hub_server.faults import FaultKind
from tests.tools.hub_server.http_messages import Origin


@dataclass(frozen=True)
class LoggedRequest:
    """One request, as far as it has got.

    `sent_bytes` and `received_bytes` count bodies only; what was sent has been handed to the kernel, so of a connection
    that ended early the client may have got a little less.
    """

    method: str
    origin: Origin
    path: str
    query: str
    range: str | None
    has_authorization: bool
    carries_token: bool
    """Whether one of the server's tokens stood anywhere in the request's line or headers."""
    status: int | None = None
    sent_bytes: int = 0
    received_bytes: int = 0
    fault: FaultKind | None = None


class RequestLog:
    """A list that many connections write to and the test reads."""

    def __init__(self) -> None:
        self._entries: list[LoggedRequest] = []
        self._dropped = 0
        self._lock = threading.Lock()

    def begin(self, entry: LoggedRequest) -> int:
        """Returns: the number to `update` it by."""
        with self._lock:
            self._entries.append(entry)
            return self._dropped + len(self._entries) - 1

    def update(self, number: int, *, sent_bytes: int = 0, received_bytes: int = 0, **changes: Any) -> None:
        """Add to the counts and set what else is known; nothing, when the log was cleared meanwhile."""
        with self._lock:
            if (index := number - self._dropped) < 0:
                return
            entry = self._entries[index]
            self._entries[index] = replace(
                entry,
                sent_bytes=entry.sent_bytes + sent_bytes,
                received_bytes=entry.received_bytes + received_bytes,
                **changes,
            )

    def clear(self) -> None:
        with self._lock:
            self._dropped += len(self._entries)
            self._entries.clear()

    def requests(self, method: str | None = None, path: str = "", origin: Origin | None = None) -> list[LoggedRequest]:
        """The requests of a method, to an origin, whose path a regular expression finds something in."""
        with self._lock:
            entries = list(self._entries)
        return [
            entry
            for entry in entries
            if method in (None, entry.method) and origin in (None, entry.origin) and re.search(path, entry.path)
        ]

    def sent_bytes(self, path: str = "", origin: Origin | None = None) -> int:
        """Bytes of bodies sent in answer to such requests, in all."""
        return sum(entry.sent_bytes for entry in self.requests(path=path, origin=origin))
