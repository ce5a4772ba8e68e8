"""What faults make of an answer."""

from __future__ import annotations

import math
from dataclasses import replace

from tests.tools.hub_server.faults import Fault, FaultKind
from tests.tools.hub_server.http_messages import FileSlice, Refusal, Response
from tests.tools.hub_server.signed_urls import expired_url

N_WRONG_BYTES = 16


def refusal_by(fault: Fault | None) -> Refusal | None:
    """The answer a fault gives instead of a route."""
    if fault is None:
        return None
    if fault.kind is FaultKind.TOO_MANY_REQUESTS:
        return Refusal(429, None, "Too Many Requests", {"Retry-After": str(math.ceil(fault.seconds))})
    if fault.kind is FaultKind.UNAVAILABLE:
        return Refusal(503, None, "Service Unavailable")
    return expired_url() if fault.kind is FaultKind.URL_EXPIRED else None


def altered(response: Response, fault: Fault | None) -> Response:
    """The answer as a fault of its length has it: cut short, or the whole file for a part of it."""
    if fault and fault.kind is FaultKind.RANGE_IGNORED and response.whole:
        headers = {name: value for name, value in response.headers.items() if name != "Content-Range"}
        return Response(200, response.whole, headers, response.content_type)
    if fault and fault.kind is FaultKind.TRUNCATED:
        n_bytes = fault.after_bytes(response.body_bytes)
        body = response.body
        return replace(response, body=replace(body, n_bytes=n_bytes) if isinstance(body, FileSlice) else body[:n_bytes])
    return response


def flipped(chunk: bytes, place: int) -> bytes:
    """The chunk with the bits of N_WRONG_BYTES bytes turned over, from `place` on, which may lie outside of it."""
    start, end = max(0, place), max(0, place + N_WRONG_BYTES)
    return chunk[:start] + bytes(byte ^ 0xFF for byte in chunk[start:end]) + chunk[end:]
