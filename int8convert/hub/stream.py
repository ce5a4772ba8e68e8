"""Shards as streams: fetched one after the other, and held in memory only while they are read.

1. A thread fetches the shards in order, over one connection at a time, into chunks of memory. It waits while the chunks
   in use reach `window_bytes`.
2. Readers wait for the bytes they want, and say from where on they still need any; earlier chunks are reused. While one
   shard is read to its end, the next is already fetched.
3. Every byte is hashed as it arrives. At the end the hash must be the Hub's, and the header must be the one that the
   conversion was planned from.
A broken connection is resumed at the next byte by a Range request. Nothing is written to the disk.

Cost: the window. Several connections at once were left out: the hash needs the bytes in order, so they would wait for
each other. `int8convert.hub.download` fetches in parallel, by xet, for those who have the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from int8convert.checkpoint.shard_access import LocalShards, OrderedReader
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import HubError
from int8convert.events import EventSink, SourceFetched, ignore
from int8convert.hub.errors import TransientError
from int8convert.hub.header_file import DigestCheck
from int8convert.hub.open_repository import RemoteShard
from int8convert.hub.remote_file import ContentCheck
from int8convert.hub.retry import retrying, transfer_budget
from int8convert.hub.shard_check import ShardCheck

CHUNK_BYTES = 4 << 20
_MAX_REQUEST_BYTES = 40_000_000_000
"""Bytes of one request. Beyond 50 GB the store behind the Hub serves ranges only (`MAX_HTTP_DOWNLOAD_SIZE` of the
client)."""

_CLOSE_S = 0.5


class _StoppedError(Exception):
    """Ends the fetching thread after `close`. Stays in the thread."""


class _ShardInFlight:
    """A shard that is being received. Readers and the fetching thread share it under the stream's condition."""

    def __init__(self, shard: SourceShard, needed_from: int) -> None:
        assert isinstance(shard.remote, RemoteShard)
        self.shard = shard
        self.file = shard.remote.file
        self.n_received = 0
        self.needed_from = needed_from
        self.chunks: dict[int, bytearray] = {}
        self.content = ContentCheck(self.file)
        self.header = DigestCheck(shard.remote.header_digests)
        self.prefetched = DigestCheck(shard.remote.prefetched.digests())
        self.is_complete = False

    def feed(self, data: memoryview) -> None:
        for check in (self.content, self.header, self.prefetched):
            check.feed(data)

    def is_unneeded(self, i: int) -> bool:
        return self.needed_from >= min((i + 1) * CHUNK_BYTES, self.shard.n_bytes)


class ShardStream:
    """`ShardAccess` to shards on the Hub.

    Args:
        first_needed: the first byte of each that will be read.
        window_bytes: the most memory for received bytes that are still needed. It must hold the blocks that are read at
            the same time, and tensors that are not one run of bytes.
        on_event: receives `SourceFetched`, in the fetching thread.
    """

    def __init__(
        self,
        shards: Sequence[SourceShard],
        first_needed: Sequence[int],
        window_bytes: int,
        on_event: EventSink = ignore,
    ) -> None:
        self._shards = list(shards)
        self._first_needed = list(first_needed)
        self._max_chunks = -(-window_bytes // CHUNK_BYTES) + 1  # the window may begin within a chunk
        self._on_event = on_event
        self._local = LocalShards()
        self._changed = threading.Condition()
        self._in_flight: dict[str, _ShardInFlight] = {}
        self._free: list[bytearray] = []
        self._n_used = 0
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._fetch_all, daemon=True)
        self._thread.start()

    def open(self, shard: SourceShard) -> OrderedReader:
        if shard.remote is None:
            return self._local.open(shard)
        return _StreamReader(self, shard)

    def is_checked(self, shard: SourceShard) -> bool:
        return shard.remote is not None

    def finish(self, shard: SourceShard) -> str | None:
        if shard.remote is None:
            return self._local.finish(shard)
        name = shard.path.name
        with self._changed:
            self._wait_for(lambda: name in self._in_flight)
            received = self._in_flight[name]
            self._release(received, shard.n_bytes)
            self._wait_for(lambda: received.is_complete)
            del self._in_flight[name]
        content = received.content
        check = ShardCheck(content.sha256, content.matches, received.header.matches, received.prefetched.matches)
        return check.sha256_of(shard)

    def close(self) -> None:
        """See `ShardAccess`. The thread ends after its current wait for the network."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        self._local.close()

    def read_into(self, shard: SourceShard, buffer: memoryview, offset: int) -> None:
        """Wait for bytes of a shard, and copy them."""
        name = shard.path.name
        with self._changed:
            self._wait_for(lambda: name in self._in_flight and self._in_flight[name].n_received >= offset + len(buffer))
            chunks = self._in_flight[name].chunks
            first = offset // CHUNK_BYTES
            # The copy below needs no lock: chunks stay unchanged until the reader releases them.
            wanted = [chunks[i] for i in range(first, (offset + len(buffer) - 1) // CHUNK_BYTES + 1)]
        done = 0
        for i, chunk in enumerate(wanted, first):
            begin = offset + done - i * CHUNK_BYTES
            part = memoryview(chunk)[begin : begin + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def release(self, shard: SourceShard, needed_from: int) -> None:
        """Reuse the memory of a shard's bytes before `needed_from`."""
        with self._changed:
            if shard.path.name in self._in_flight:
                self._release(self._in_flight[shard.path.name], needed_from)

    def _release(self, received: _ShardInFlight, needed_from: int) -> None:
        received.needed_from = max(received.needed_from, needed_from)
        for i in [i for i in received.chunks if received.is_unneeded(i)]:
            self._free.append(received.chunks.pop(i))
            self._n_used -= 1
        self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._error is not None or self._is_closed or condition())
        if not condition():
            raise self._error or HubError("the stream was closed", "run the same command again")

    def _fetch_all(self) -> None:
        try:
            for shard, first_needed in zip(self._shards, self._first_needed, strict=True):
                if shard.remote is None:
                    continue
                in_flight = _ShardInFlight(shard, first_needed)
                with self._changed:
                    self._in_flight[shard.path.name] = in_flight
                    self._changed.notify_all()
                self._fetch(in_flight)
        except _StoppedError:
            pass
        except BaseException as error:  # raised to the readers, which would wait forever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch(self, shard: _ShardInFlight) -> None:
        """Fetch one shard over as many connections as it takes."""
        file = shard.file
        budget = transfer_budget(file.subject)

        def attempt() -> None:
            end = min(shard.n_received + _MAX_REQUEST_BYTES, file.n_bytes)
            with file.stream(shard.n_received, end) as pieces:
                for piece in pieces:
                    if shard.n_received == end:
                        break
                    self._take(shard, memoryview(piece)[: end - shard.n_received])
                    budget.progressed()
            if shard.n_received < end:
                raise TransientError("the answer ended early")

        while shard.n_received < file.n_bytes:
            retrying(attempt, budget, self._pause)
        with self._changed:
            shard.is_complete = True
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._is_closed, seconds):
                raise _StoppedError

    def _take(self, shard: _ShardInFlight, piece: memoryview) -> None:
        """Check the next bytes, and put them where readers find them."""
        shard.feed(piece)
        at = shard.n_received
        while len(piece):
            i, begin = divmod(at, CHUNK_BYTES)
            part = piece[: CHUNK_BYTES - begin]
            chunk = self._chunk(shard, i)
            if chunk is not None:
                chunk[begin : begin + len(part)] = part
            at += len(part)
            piece = piece[len(part) :]
            with self._changed:
                shard.n_received = at
                self._changed.notify_all()
        self._on_event(SourceFetched(shard.shard.path.name, at))

    def _chunk(self, shard: _ShardInFlight, i: int) -> bytearray | None:
        """Wait for room, and return the memory of chunk i; None if no reader needs it."""
        with self._changed:
            if i not in shard.chunks:
                self._changed.wait_for(
                    lambda: self._is_closed or self._n_used < self._max_chunks or shard.is_unneeded(i)
                )
                if not self._is_closed and shard.is_unneeded(i):
                    return None
            if self._is_closed:
                raise _StoppedError
            if i not in shard.chunks:
                shard.chunks[i] = self._free.pop() if self._free else bytearray(CHUNK_BYTES)
                self._n_used += 1
            return shard.chunks[i]


class _StreamReader:
    """An `OrderedReader` of one shard of a stream."""

    needs_order = True

    def __init__(self, stream: ShardStream, shard: SourceShard) -> None:
        self._stream = stream
        self._shard = shard

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if len(buffer):
            self._stream.read_into(self._shard, buffer, offset)

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        self._stream.release(self._shard, needed_from)

    def close(self) -> None:
        """See `ShardReader`."""
