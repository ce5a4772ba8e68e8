"""Sockets: reads requests, sends answers, and does to both what the faults say."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.tools.hub_server.bandwidth import Bandwidth
from tests.tools.hub_server.damage import altered, flipped, refusal_by
from tests.tools.hub_server.faults import FLOW_KINDS, Fault, FaultKind, Faults
from tests.tools.hub_server.http_messages import FileSlice, Origin, Request, Response
from tests.tools.hub_server.request_log import LoggedRequest, RequestLog
from tests.tools.hub_server.routing import answer
from tests.tools.hub_server.server_state import ServerState

CHUNK_BYTES = 64 * 1024
UNKNOWN_LENGTH_BYTES = 64 * 1024
"""Within which a fault's place is drawn when an upload does not say how long it is."""


class Dropped(Exception):
    """The connection is to end, by a fault."""


@dataclass(frozen=True)
class Surroundings:
    """What a server serves, remembers and obeys; it belongs to the test and outlives the server."""

    state: ServerState
    log: RequestLog
    faults: Faults
    bandwidth: Bandwidth
    bugs: list[str]
    """Tracebacks of errors of the server's own."""
    restart: Callable[[float], None]


class HubServer(ThreadingHTTPServer):
    """Listens on loopback."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, around: Surroundings) -> None:
        super().__init__(("127.0.0.1", port), HubHandler)
        self.around = around
        self.stopping = threading.Event()
        self.to_reset: set[socket.socket] = set()
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        if request in self.to_reset:
            self.to_reset.discard(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def drop_connections(self) -> None:
        """End every connection, as the death of the process would."""
        self.stopping.set()
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):  # it may have ended already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.around.bugs.append(traceback.format_exc())


class HubHandler(BaseHTTPRequestHandler):
    """One connection. A client that hangs up ends it in silence."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def setup(self) -> None:
        # What lies in the kernel's buffer counts as sent: keep it small, so that the log tells how far a client got.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)
        super().setup()

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, Dropped):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """The request log is enough."""

    def _serve(self) -> None:
        request = self._request()
        around = self.server.around
        fault = around.faults.take(request.method, request.path, request.origin, "Range" in self.headers)
        self._number = around.log.begin(self._entry(request, fault))
        self._fault = fault
        is_upload = "chunked" in self.headers.get("Transfer-Encoding", "") or self._content_length() > 0
        self._body = self._faulty_chunks(fault if is_upload else None)
        try:
            refused = refusal_by(fault)
            response = refused.response() if refused else answer(around.state, request)
        except (ConnectionError, Dropped):
            raise
        except Exception:
            around.bugs.append(traceback.format_exc())
            response = Response(500, b"{}")
        for _ in self._body:
            pass  # an answer may leave the body unread; the next request begins behind it
        self._send(altered(response, fault), None if is_upload else fault)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _request(self) -> Request:
        parts = urlsplit(self.path)
        origin = Origin.STORAGE if self.headers.get("Host", "").startswith(Origin.STORAGE) else Origin.HUB
        query = dict(parse_qsl(parts.query))
        return Request(self.command, origin, parts.path, query, self.headers, lambda: self._body)

    def _entry(self, request: Request, fault: Fault | None) -> LoggedRequest:
        everything = f"{self.path} {self.headers.as_string()}"
        return LoggedRequest(
            method=request.method,
            origin=request.origin,
            path=request.path,
            query=urlsplit(self.path).query,
            range=self.headers.get("Range"),
            has_authorization="Authorization" in self.headers,
            carries_token=any(token in everything for token in self.server.around.state.accounts.tokens),
            fault=fault.kind if fault else None,
        )

    def _content_length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _faulty_chunks(self, fault: Fault | None) -> Iterator[bytes]:
        """The request's body as it arrives."""
        place = -1
        if fault and fault.kind in FLOW_KINDS:
            place = fault.after_bytes(self._content_length() or UNKNOWN_LENGTH_BYTES)
        received = 0
        for chunk in self._raw_chunks():
            self.server.around.bandwidth.wait(len(chunk))
            if fault and received <= place < received + len(chunk):
                self._log(received_bytes=place - received)
                self._break_flow(fault)
                self._log(received_bytes=received - place)
            received += len(chunk)
            self._log(received_bytes=len(chunk))
            yield chunk

    def _raw_chunks(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while n_bytes := int(self.rfile.readline().split(b";")[0], 16):
                yield self._read(n_bytes)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = self._content_length()
        while left:
            chunk = self._read(min(left, self.server.around.bandwidth.chunk_bytes(CHUNK_BYTES)))
            left -= len(chunk)
            yield chunk

    def _read(self, n_bytes: int) -> bytes:
        data = self.rfile.read(n_bytes)
        if len(data) < n_bytes:
            raise ConnectionResetError("the client hung up within a body")
        return data

    def _break_flow(self, fault: Fault) -> None:
        """Raises: Dropped, except after a stall."""
        if fault.kind is FaultKind.STALL:
            if self.server.stopping.wait(fault.seconds) or self._client_has_hung_up():
                raise Dropped
            return
        if fault.kind is FaultKind.RESET:
            self.server.to_reset.add(self.request)
        if fault.kind is FaultKind.RESTART:
            self.server.around.restart(fault.seconds)
        raise Dropped

    def _client_has_hung_up(self) -> bool:
        readable, _, _ = select.select([self.request], [], [], 0)
        with contextlib.suppress(ConnectionError):
            return bool(readable) and not self.request.recv(1, socket.MSG_PEEK)
        return True

    def _log(self, **changes: Any) -> None:
        self.server.around.log.update(self._number, **changes)

    def _send(self, response: Response, fault: Fault | None) -> None:
        n_bytes = 0 if self.command == "HEAD" else response.body_bytes
        place = fault.after_bytes(n_bytes) if fault and fault.kind in FLOW_KINDS | {FaultKind.WRONG_BYTES} else -1
        is_broken = fault is not None and fault.kind in FLOW_KINDS
        if fault and is_broken and place == 0:
            self._break_flow(fault)
            is_broken = False
        self._log(status=response.status)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(response.body_bytes))
        self.end_headers()
        sent = 0
        for chunk in self._body_chunks(response, n_bytes):
            if fault and fault.kind is FaultKind.WRONG_BYTES:
                chunk = flipped(chunk, place - sent)
            if fault and is_broken and sent <= place <= sent + len(chunk):
                self._write(chunk[: place - sent])
                self._break_flow(fault)
                chunk, sent, is_broken = chunk[place - sent :], place, False
            self._write(chunk)
            sent += len(chunk)

    def _body_chunks(self, response: Response, n_bytes: int) -> Iterator[bytes]:
        if n_bytes and isinstance(response.body, bytes):
            yield response.body
        elif n_bytes and isinstance(response.body, FileSlice):
            with response.body.path.open("rb") as file:
                file.seek(response.body.start)
                while n_bytes:
                    chunk = file.read(min(n_bytes, self.server.around.bandwidth.chunk_bytes(CHUNK_BYTES)))
                    n_bytes -= len(chunk)
                    yield chunk

    def _write(self, data: bytes) -> None:
        self.server.around.bandwidth.wait(len(data))
        self._log(sent_bytes=len(data))
        self.wfile.write(data)
