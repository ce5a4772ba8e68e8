"""Shards that pass by: fetched one after the other as streams, held only as long as somebody has to read them.

1. A thread fetches the shards in order, over one connection at a time, and puts what comes into chunks of memory. When
   the chunks in use come to `window_bytes`, it waits.
2. Readers wait for the bytes they want, and say from where on they still need any; chunks before that are used again.
   While one shard is read to its end, the next is already coming.
3. Every byte is hashed as it comes, read or not. At the end the hash must be the Hub's, and the header the plan was
   made from must have passed by, too.
A connection that breaks off is continued at the next byte, by a Range request. Nothing is written to the disk.

Costs the window. Left out on purpose: several connections at once, which the order of the hash would make wait for each
other; who has the disk for it downloads by xet, which does that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from int8convert.checkpoint.shard_access import LocalShards, OrderedReader
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import HubError
from int8convert.events import EventSink, SourceFetched, ignore
from int8convert.hub.header_file import EvidenceCheck
from int8convert.hub.open_repository import RemoteShard
from int8convert.hub.repository import ContentCheck
from int8convert.hub.retry import PassingError, Patience, transfer_patience_s
from int8convert.hub.shard_check import ShardCheck

CHUNK_BYTES = 4 << 20
_MOST_AT_ONCE = 40_000_000_000
"""Of a file by one request: beyond 50 GB the store behind the Hub gives parts only (`MAX_HTTP_DOWNLOAD_SIZE` of the
client)."""

_CLOSE_S = 0.5


class _Stopped(Exception):
    """Nobody wants the stream any longer. Stays in its thread."""


class _Passing:
    """One shard on its way by."""

    def __init__(self, shard: SourceShard, needed_from: int) -> None:
        assert isinstance(shard.remote, RemoteShard)
        self.shard = shard
        self.remote = shard.remote
        self.n_come = 0
        self.needed_from = needed_from
        self.chunks: dict[int, bytearray] = {}
        self.is_whole = False
        file = shard.remote.file
        self.content = ContentCheck(file.n_bytes, file.sha256, file.blob_id)
        self.header = EvidenceCheck(shard.remote.evidence)
        self.known = EvidenceCheck(shard.remote.known.evidence())


class ShardStream:
    """`ShardAccess` to shards on the Hub, in the order given.

    Args:
        shards: those that will be opened, in order.
        first_needed: of each, the first byte that will be read.
        window_bytes: most memory for bytes that have come and are still needed; at least what the blocks that are read
            at the same time, and the tensors that are no plain run of bytes, span.
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
        self._most_chunks = -(-window_bytes // CHUNK_BYTES) + 1  # the window may begin within a chunk
        self._on_event = on_event
        self._local = LocalShards()
        self._changed = threading.Condition()
        self._passing: dict[str, _Passing] = {}
        self._free: list[bytearray] = []
        self._n_used = 0
        self._error: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._fetch_all, daemon=True)
        self._thread.start()

    def open(self, shard: SourceShard) -> OrderedReader:
        """See `ShardAccess`."""
        if shard.remote is None:
            return self._local.open(shard)
        return _StreamReader(self, shard)

    def is_checked(self, shard: SourceShard) -> bool:
        """See `ShardAccess`."""
        return shard.remote is not None

    def finish(self, shard: SourceShard) -> str:
        """See `ShardAccess`."""
        if shard.remote is None:
            return self._local.finish(shard)
        name = shard.path.name
        with self._changed:
            self._wait_for(lambda: name in self._passing)
            passing = self._passing[name]
            self._release(passing, shard.n_bytes)
            self._wait_for(lambda: passing.is_whole)
            del self._passing[name]
        content, header, known = passing.content, passing.header, passing.known
        return ShardCheck(content.sha256, content.is_right, header.is_kept, known.is_kept).sha256_of(shard)

    def close(self) -> None:
        """See `ShardAccess`. The thread may wait for the network; it ends by itself, and harms nobody meanwhile."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        self._local.close()

    def read_into(self, shard: SourceShard, buffer: memoryview, offset: int) -> None:
        """Wait for bytes of a shard, and copy them."""
        name = shard.path.name
        with self._changed:
            self._wait_for(lambda: name in self._passing and self._passing[name].n_come >= offset + len(buffer))
            chunks = self._passing[name].chunks
            first = offset // CHUNK_BYTES
            # Chunks stay as they are until the reader says that it is through with them.
            wanted = [chunks[i] for i in range(first, (offset + len(buffer) - 1) // CHUNK_BYTES + 1)]
        done = 0
        for i, chunk in enumerate(wanted, first):
            begin = offset + done - i * CHUNK_BYTES
            part = memoryview(chunk)[begin : begin + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def release(self, shard: SourceShard, needed_from: int) -> None:
        """No byte of the shard before this one will be read again."""
        with self._changed:
            if shard.path.name in self._passing:
                self._release(self._passing[shard.path.name], needed_from)

    def _release(self, passing: _Passing, needed_from: int) -> None:
        passing.needed_from = max(passing.needed_from, needed_from)
        is_over = passing.needed_from >= passing.shard.n_bytes
        for i in [i for i in passing.chunks if is_over or (i + 1) * CHUNK_BYTES <= passing.needed_from]:
            self._free.append(passing.chunks.pop(i))
            self._n_used -= 1
        self._changed.notify_all()

    def _wait_for(self, is_so: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._error is not None or self._is_closed or is_so())
        if not is_so():
            raise self._error or HubError("the stream was closed", "run the same command again")

    def _fetch_all(self) -> None:
        try:
            for shard, first_needed in zip(self._shards, self._first_needed, strict=True):
                if shard.remote is None:
                    continue
                passing = _Passing(shard, first_needed)
                with self._changed:
                    self._passing[shard.path.name] = passing
                    self._changed.notify_all()
                self._fetch(passing)
        except _Stopped:
            pass
        except BaseException as error:  # whoever waits for bytes raises it; without one it would wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch(self, passing: _Passing) -> None:
        """One shard, over as many connections as it takes."""
        file = passing.remote.file
        patience = Patience(file.subject, transfer_patience_s())
        while passing.n_come < file.n_bytes:
            if self._is_closed:
                raise _Stopped
            end = min(passing.n_come + _MOST_AT_ONCE, file.n_bytes)
            try:
                with file.stream(passing.n_come, end) as pieces:
                    for piece in pieces:
                        if passing.n_come == end:
                            break
                        self._take(passing, memoryview(piece)[: end - passing.n_come])
                        patience.progressed()
                if passing.n_come < end:
                    raise PassingError("the answer ended early")
            except PassingError as trouble:
                patience.wait(trouble, self._pause)
        with self._changed:
            passing.is_whole = True
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _take(self, passing: _Passing, piece: memoryview) -> None:
        """Put the next bytes where readers find them."""
        passing.content.feed(piece)
        passing.header.feed(piece)
        passing.known.feed(piece)
        at = passing.n_come
        while len(piece):
            i, begin = divmod(at, CHUNK_BYTES)
            part = piece[: CHUNK_BYTES - begin]
            chunk = self._chunk(passing, i)
            if chunk is not None:
                chunk[begin : begin + len(part)] = part
            at += len(part)
            piece = piece[len(part) :]
            with self._changed:
                passing.n_come = at
                self._changed.notify_all()
        self._on_event(SourceFetched(passing.shard.path.name, at))

    def _chunk(self, passing: _Passing, i: int) -> bytearray | None:
        """The chunk for these bytes, once there is room for it; None if nobody needs them."""
        with self._changed:
            if i not in passing.chunks:
                self._changed.wait_for(
                    lambda: self._is_closed or self._n_used < self._most_chunks or _is_needless(passing, i)
                )
                if self._is_closed:
                    raise _Stopped
                if _is_needless(passing, i):
                    return None
                passing.chunks[i] = self._free.pop() if self._free else bytearray(CHUNK_BYTES)
                self._n_used += 1
            elif self._is_closed:
                raise _Stopped
            return passing.chunks[i]


def _is_needless(passing: _Passing, i: int) -> bool:
    return passing.needed_from >= min((i + 1) * CHUNK_BYTES, passing.shard.n_bytes)


class _StreamReader:
    """An `OrderedReader` of one shard of a stream."""

    def __init__(self, stream: ShardStream, shard: SourceShard) -> None:
        self._stream = stream
        self._shard = shard

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ShardReader`."""
        if len(buffer):
            self._stream.read_into(self._shard, buffer, offset)

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        """See `OrderedReader`."""
        self._stream.release(self._shard, needed_from)

    def close(self) -> None:
        """See `ShardReader`."""
