"""Reads a weight file on the Hub by plain HTTP: ranges, or the whole file as one stream.

Each request starts at the Hub, which redirects to a signed URL of its store, so an expired URL is replaced by asking
again. The HTTP client drops the token when a redirect leads to another host. An answer counts only if its status and
Content-Range match the request: some proxies ignore Range and send the file from its beginning.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from int8convert.errors import HubError
from int8convert.hub.bounded_answer import raise_for_status
from int8convert.hub.errors import TransientError, translating_errors
from int8convert.hub.retry import retrying, transfer_budget
from int8convert.text import quoted

if TYPE_CHECKING:
    import httpx2

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_CONNECT_S = 10.0
_MIN_READ_AHEAD = 1 << 17
_MAX_READ_AHEAD = 16 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at a commit, as the Hub lists it.

    Attributes:
        name: the path in the repository.
        sha256: of the content, in hex; None for files outside of LFS.
        blob_id: git's id; for LFS files, that of the pointer.
    """

    repository: str
    commit: str
    name: str
    n_bytes: int
    sha256: str | None
    blob_id: str

    @property
    def subject(self) -> str:
        return f"reading {quoted(self.name)} of {quoted(self.repository)}"

    def open(self) -> RangeReader:
        return RangeReader(self)

    def is_content(self, content: bytes) -> bool:
        check = ContentCheck(self)
        check.feed(content)
        return check.matches

    def read_range(self, begin: int, n_bytes: int) -> bytes:
        """Read `n_bytes` bytes from `begin` on, with retries."""

        def attempt() -> bytes:
            with self._answer(begin, begin + n_bytes, _MAX_READ_AHEAD) as pieces:
                content = bytearray()
                for piece in pieces:
                    content += piece[: n_bytes - len(content)]
                    if len(content) == n_bytes:
                        return bytes(content)
            raise TransientError("the answer was too short")

        return retrying(attempt, transfer_budget(self.subject))

    @contextmanager
    def stream(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        """Yield the pieces of a range as they arrive over one connection, without retries.

        A server that ignores Range sends bytes after `end`, too.

        Raises:
            TransientError: the connection broke off, or was refused for now.
            HubError: an error is permanent.
        """
        with self._answer(begin, end, self.n_bytes) as pieces:
            yield pieces

    @contextmanager
    def _answer(self, begin: int, end: int, max_skipped: int) -> Iterator[Iterator[bytes]]:
        """Yield the pieces of a range. At most `max_skipped` bytes before it are read and dropped."""
        import httpx2
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if (begin, end) != (0, self.n_bytes):
            headers["Range"] = f"bytes={begin}-{end - 1}"
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, connect=_CONNECT_S)
        with (
            translating_errors(self.repository),
            get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
        ):
            if response.status_code == 416:
                raise TransientError("the server's file has fewer bytes than the Hub lists")
            raise_for_status(response)
            n_skipped = begin if self._is_whole(response, begin) else 0
            if n_skipped > max_skipped:
                raise TransientError("the server ignores Range requests")
            yield _skipping(response, n_skipped)

    def _is_whole(self, response: httpx2.Response, begin: int) -> bool:
        """Return whether the answer is the whole file instead of the range. Raise if it is neither."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(
                f"{self.subject}: the server's encoding is {quoted(response.headers['Content-Encoding'], 40)}, "
                "expected none, as requested",
                "check the proxy between this machine and the Hub",
            )
        if response.status_code == 200:
            return True
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != begin:
            raise TransientError("the answer was for another range")
        if found[3] not in ("*", str(self.n_bytes)):
            raise TransientError(f"the server's file has {found[3]} bytes, the Hub lists {self.n_bytes}")
        return False


def _skipping(response: httpx2.Response, n_skipped: int) -> Iterator[bytes]:
    """Yield the body's pieces without its first bytes."""
    for piece in response.iter_raw():
        if n_skipped < len(piece):
            yield piece[n_skipped:]
        n_skipped = max(0, n_skipped - len(piece))


class ContentCheck:
    """Compares a file's bytes, fed in order, with what the Hub lists."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._blob = None if file.sha256 else hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)

    def feed(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        if self._blob is not None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        """The sha256 of all bytes so far, in hex."""
        return self._sha256.hexdigest()

    @property
    def matches(self) -> bool:
        """The bytes so far are the whole file."""
        if self._blob is not None:
            return self._blob.hexdigest() == self._file.blob_id
        return self.sha256 == self._file.sha256


class RangeReader:
    """A thread-safe `ShardReader` of a file on the Hub. Sequential reads double the read-ahead.

    No hash covers what it reads, so conversions read weights by a `ShardAccess` instead.
    """

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._begin = 0
        self._data = b""
        self._read_ahead = _MIN_READ_AHEAD

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        with self._lock:
            while done < len(buffer):
                at = offset + done - self._begin
                if not 0 <= at < len(self._data):
                    self._fetch(offset + done, len(buffer) - done)
                    at = 0
                n = min(len(buffer) - done, len(self._data) - at)
                buffer[done : done + n] = self._data[at : at + n]
                done += n

    def _fetch(self, offset: int, n_bytes: int) -> None:
        is_sequential = offset == self._begin + len(self._data)
        self._read_ahead = min(2 * self._read_ahead, _MAX_READ_AHEAD) if is_sequential else _MIN_READ_AHEAD
        wanted = min(max(n_bytes, self._read_ahead), self._file.n_bytes - offset)
        self._data = b""
        self._data = self._file.read_range(offset, wanted)
        self._begin = offset

    def close(self) -> None:
        self._data = b""
