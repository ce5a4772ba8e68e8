"""An HTTP proxy on loopback, as companies put one before their networks: it demands a password, then forwards."""

from __future__ import annotations

import base64
import threading
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

_PIECE_BYTES = 1 << 16
_OF_THE_CONNECTION = {"connection", "proxy-authorization", "proxy-connection", "transfer-encoding"}


class ForwardProxy:
    """A context manager.

    Attributes:
        password: without which it forwards nothing.
        forwarded: the address of each request that it forwarded.
        n_refused: how many it did not.
    """

    user, password = "somebody", "s3cret-of-the-proxy"

    def __init__(self) -> None:
        self.forwarded: list[str] = []
        self.n_refused = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _forward(self) -> None:
                proxy.forward(self)

            # The names http.server looks for. No tunnels: those of this server's clients need none.
            do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = _forward

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, password: str | None = None) -> str:
        """The value for HTTP_PROXY."""
        return f"http://{self.user}:{password or self.password}@127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ForwardProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request with the answer of the server it is for."""
        expected = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if request.command == "CONNECT" or request.headers.get("Proxy-Authorization") != f"Basic {expected}":
            self.n_refused += 1
            request.send_error(407)
            return
        self.forwarded.append(request.path)
        target = urlsplit(request.path)
        assert target.hostname is not None
        connection = HTTPConnection(target.hostname, target.port, timeout=10)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        connection.request(request.command, target._replace(scheme="", netloc="").geturl(), body, headers)
        answer = connection.getresponse()
        request.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_THE_CONNECTION:
                request.send_header(name, value)
        request.end_headers()
        while piece := answer.read(_PIECE_BYTES):
            request.wfile.write(piece)
        connection.close()
