"""What may go wrong on the way, ordered by a test: which request, which fault, after how many bytes.

A place not named is drawn from a seed: the request among the first so many, the byte within the body it breaks.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.tools.hub_server.http_messages import Origin


class FaultKind(StrEnum):
    """The body meant is the request's where it has one (an upload), else the answer's."""

    CUT = "cut"
    """The connection is closed after some bytes of the body; after 0, before any answer."""
    RESET = "reset"
    """The same, with a TCP reset instead of a close."""
    STALL = "stall"
    """Nothing flows for `seconds` after some bytes of the body; then it goes on."""
    WRONG_BYTES = "wrong bytes"
    """From there on, up to 16 bytes of the answer have all their bits turned over."""
    TRUNCATED = "truncated body"
    """A complete, well-formed answer whose body ends after so many bytes and whose Content-Length says so."""
    RANGE_IGNORED = "range ignored"
    """Status 200 and the whole file, though a Range was asked for."""
    TOO_MANY_REQUESTS = "429"
    """Status 429 with `Retry-After: seconds`."""
    UNAVAILABLE = "503"
    URL_EXPIRED = "url expired"
    """Status 403 in the object store's words."""
    RESTART = "restart"
    """After some bytes of the body all connections end; for `seconds` nobody listens; then all is as before."""


FLOW_KINDS = frozenset({FaultKind.CUT, FaultKind.RESET, FaultKind.STALL, FaultKind.RESTART})
"""Faults of the connection, at a byte of a body; a request without a body either way is broken before its answer."""


@dataclass(frozen=True)
class Fault:
    """A fault that happens to the request at hand."""

    kind: FaultKind
    position: float
    """Bytes if `is_exact`, else a share of the body, in [0, 1)."""
    is_exact: bool
    seconds: float

    def after_bytes(self, body_bytes: int) -> int:
        """Where in a body of that length it happens."""
        return min(int(self.position), body_bytes) if self.is_exact else int(self.position * body_bytes)


@dataclass(frozen=True)
class FiredFault:
    """A fault that happened, for a test that must know it did."""

    kind: FaultKind
    method: str
    path: str


@dataclass
class _Order:
    method: str | None
    path: re.Pattern[str]
    origin: Origin | None
    first: int
    times: float
    fault: Fault
    n_seen: int = 0

    def is_due(self, method: str, path: str, origin: Origin, has_range: bool) -> bool:
        """Count the request if it is of those meant; whether it is one to break."""
        if self.method not in (None, method) or self.origin not in (None, origin) or not self.path.search(path):
            return False
        if not _can_happen(self.fault.kind, method, origin, has_range):
            return False
        self.n_seen += 1
        return self.first <= self.n_seen < self.first + self.times


def _can_happen(kind: FaultKind, method: str, origin: Origin, has_range: bool) -> bool:
    """Whether a request is of those that can meet the fault; others do not count."""
    if kind in (FaultKind.WRONG_BYTES, FaultKind.TRUNCATED):
        return method == "GET"
    if kind is FaultKind.RANGE_IGNORED:
        return method == "GET" and has_range
    return kind is not FaultKind.URL_EXPIRED or origin is Origin.STORAGE


class Faults:
    """The orders of a test. Every order counts every request it means; a request takes the oldest order that is due."""

    def __init__(self) -> None:
        self._orders: list[_Order] = []
        self._fired: list[FiredFault] = []
        self._lock = threading.Lock()

    def add(
        self,
        kind: FaultKind,
        *,
        method: str | None = None,
        path: str = "",
        origin: Origin | None = None,
        nth: int | None = 1,
        among: int = 1,
        times: float = 1,
        after_bytes: int | None = None,
        seconds: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Break requests of `method` to `origin` whose path the regular expression `path` finds something in.

        Args:
            nth: the first one broken, counted from 1 and from now; None draws it from the first `among`.
            times: how many from there on; math.inf for all.
            after_bytes: where in the body; None draws a place within it.
            seconds: how long a stall or a restart lasts; what Retry-After says.
            seed: of what is drawn.
        """
        draw = random.Random(seed)
        first = draw.randint(1, among) if nth is None else nth
        position = draw.random() if after_bytes is None else float(after_bytes)
        fault = Fault(kind, position, after_bytes is not None, seconds)
        with self._lock:
            self._orders.append(_Order(method, re.compile(path), origin, first, times, fault))

    def take(self, method: str, path: str, origin: Origin, has_range: bool) -> Fault | None:
        """The fault for this request, if one is due."""
        with self._lock:
            due = [order for order in self._orders if order.is_due(method, path, origin, has_range)]
            if not due:
                return None
            self._fired.append(FiredFault(due[0].fault.kind, method, path))
            return due[0].fault

    def clear(self) -> None:
        """Order no more faults."""
        with self._lock:
            self._orders.clear()

    @property
    def fired(self) -> Sequence[FiredFault]:
        with self._lock:
            return tuple(self._fired)
