"""A weight file on the Hub, read by plain HTTP: pieces by Range requests, or all of it as one stream.

Each request begins at the Hub, which sends it on to a signed address of its store: so an address that has run out is
had anew by asking again. The HTTP client takes the token off when it follows to another host. An answer counts only if
its status and Content-Range say that it is what was asked for: some proxies ignore Range and send the file from its
beginning.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from int8convert.errors import HubError
from int8convert.hub.bounded_answer import raise_for_status
from int8convert.hub.errors import translating_errors
from int8convert.hub.retry import PassingError, Patience, transfer_patience_s
from int8convert.text import quoted

if TYPE_CHECKING:
    import httpx2

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_CONNECT_S = 10.0
_FIRST_AHEAD = 1 << 17
_MOST_AHEAD = 16 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository at a commit.

    Attributes:
        n_bytes, sha256, blob_id: as `RepositoryFile` has them.
    """

    repository: str
    commit: str
    name: str
    n_bytes: int
    sha256: str | None
    blob_id: str

    @property
    def subject(self) -> str:
        """For errors."""
        return f"reading {quoted(self.name)} of {quoted(self.repository)}"

    def open(self) -> RangeReader:
        """For reading here and there."""
        return RangeReader(self)

    def read_range(self, begin: int, n_bytes: int) -> bytes:
        """So many bytes from `begin` on, tried again while trouble may pass.

        Raises:
            HubError: they do not come.
        """
        patience = Patience(self.subject, transfer_patience_s())
        while True:
            try:
                with self._answer(begin, begin + n_bytes, _MOST_AHEAD) as pieces:
                    content = bytearray()
                    for piece in pieces:
                        content += piece[: n_bytes - len(content)]
                        if len(content) == n_bytes:
                            return bytes(content)
                raise PassingError("the answer was too short")
            except PassingError as trouble:
                patience.wait(trouble)

    @contextmanager
    def stream(self, begin: int, end: int) -> Iterator[Iterator[bytes]]:
        """The bytes from `begin` on, as they come over one connection; more than those before `end` from a server that
        ignores Range.

        Raises:
            PassingError: the connection broke off, or was refused for now.
            HubError: the file cannot be had.
        """
        with self._answer(begin, end, self.n_bytes) as pieces:
            yield pieces

    @contextmanager
    def _answer(self, begin: int, end: int, most_skipped: int) -> Iterator[Iterator[bytes]]:
        """The pieces of a range; of a server that ignores Range, what is behind at most so many bytes."""
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
                raise PassingError("the server has fewer bytes of it than the Hub lists")
            raise_for_status(response)
            n_skipped = begin if self._is_whole(response, begin) else 0
            if n_skipped > most_skipped:
                raise PassingError("the server ignores Range requests")
            yield _skipping(response, n_skipped)

    def _is_whole(self, response: httpx2.Response, begin: int) -> bool:
        """Whether the answer is the whole file, not the range; raises if it is neither."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise HubError(
                f"{self.subject}: the server sends it in encoding {quoted(response.headers['Content-Encoding'], 40)}, "
                "though asked for it as it is",
                "see what proxy stands between here and the Hub",
            )
        if response.status_code == 200:
            return True
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != begin:
            raise PassingError("the answer was for another range")
        if found[3] not in ("*", str(self.n_bytes)):
            raise PassingError(f"the server's file has {found[3]} bytes, the Hub lists {self.n_bytes}")
        return False


def _skipping(response: httpx2.Response, n_skipped: int) -> Iterator[bytes]:
    """The body's pieces, without its first bytes."""
    for piece in response.iter_raw():
        if n_skipped < len(piece):
            yield piece[n_skipped:]
        n_skipped = max(0, n_skipped - len(piece))


class RangeReader:
    """A `ShardReader` of a file on the Hub: reads ahead, the more the longer it is read in order.

    For several threads. What it reads has no hash of its own, so whoever converts it goes another way.
    """

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._begin = 0
        self._data = b""
        self._ahead = _FIRST_AHEAD

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ShardReader`."""
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
        is_next = offset == self._begin + len(self._data)
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if is_next else _FIRST_AHEAD
        wanted = min(max(n_bytes, self._ahead), self._file.n_bytes - offset)
        self._data = b""
        self._data = self._file.read_range(offset, wanted)
        self._begin = offset

    def close(self) -> None:
        """See `ShardReader`."""
        self._data = b""
