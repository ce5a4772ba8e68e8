"""Access to whole source shards: one after the other, each checked while it is read, each released at its end.

A conversion opens a shard, reads its blocks in the order of its bytes, releases them, and finishes the shard. Finishing
compares its sha256 with the expected one, if one is known. `LocalShards` reads local files; `hub.stream` and
`hub.download` read the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from int8convert.checkpoint.file_reader import FileReader
from int8convert.checkpoint.hashing import OrderedSha256, expected_sha256
from int8convert.checkpoint.source import ShardReader, SourceShard
from int8convert.errors import CorruptFileError
from int8convert.text import quoted


class DamagedShardError(Exception):
    """A shard came with other bytes than its source lists; fetched again, it may be right. Reaches no user."""

    def __init__(self, shard: SourceShard, message: str) -> None:
        super().__init__(message)
        self.shard = shard


class OrderedReader(ShardReader, Protocol):
    """A `ShardReader` of a shard that is read from its beginning to its end.

    Attributes:
        needs_order: whether `read_on` has an effect. If not, threads need not wait for their turn to call it.
    """

    @property
    def needs_order(self) -> bool: ...

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        """Record a block that was read; called once a block, in order.

        Args:
            data: the block, if it is one piece of the file; else None.
            offset: where it begins in the file.
            needed_from: no byte before this one will be read again.
        """


class ShardAccess(Protocol):
    """Access to the shards of one source."""

    def open(self, shard: SourceShard) -> OrderedReader:
        """Open a shard, or reopen one whose reader was closed before it was finished.

        Raises:
            OSError: a local file cannot be read.
            HubError: the shard cannot be fetched.
        """

    def is_checked(self, shard: SourceShard) -> bool:
        """Return whether results of the shard must wait until `finish` has confirmed its bytes."""

    def finish(self, shard: SourceShard) -> str | None:
        """Return the sha256 of a shard, in hex, and release it. Reads the rest of it first.

        None for a local file of which no sha256 is known: nothing could be compared with it.

        Raises:
            CorruptFileError: it is not the one expected.
            DamagedShardError: the same, and fetching it again may help.
            OSError, HubError: as `open`.
        """

    def close(self) -> None:
        """Release everything."""


class LocalShards:
    """`ShardAccess` to local files.

    A file is hashed only if the client that fetched it wrote down its sha256. Hashing takes a third of the CPU time of
    a conversion (docs/results/convert.md).
    """

    def __init__(self) -> None:
        self._hashes: dict[Path, OrderedSha256] = {}

    def open(self, shard: SourceShard) -> OrderedReader:
        is_hashed = expected_sha256(shard.path) is not None
        return LocalReader(FileReader(shard.path, shard.identity), self.hash_of(shard) if is_hashed else None)

    def hash_of(self, shard: SourceShard) -> OrderedSha256:
        """Return the unfinished hash of a shard."""
        if shard.path not in self._hashes:
            self._hashes[shard.path] = OrderedSha256(shard.path, shard.identity)
        return self._hashes[shard.path]

    def is_checked(self, shard: SourceShard) -> bool:
        """See `ShardAccess`: a local file that is wrong stays wrong, so nothing has to wait."""
        return False

    def finish(self, shard: SourceShard) -> str | None:
        """See `ShardAccess`; raises a CorruptFileError also of a file that was changed meanwhile."""
        expected = expected_sha256(shard.path)
        if expected is None:
            if shard.identity is not None:
                shard.identity.check(shard.path, shard.path.name)
            return None
        found = self.hash_of(shard).finish()
        if found != expected:
            raise CorruptFileError(
                f"{quoted(shard.path.name)} has sha256 {found}, expected {expected}, as the client that fetched it "
                "wrote down",
                "fetch this file again and rerun the same command",
            )
        return found

    def close(self) -> None:
        for hashing in self._hashes.values():
            hashing.close()


class LocalReader:
    """An `OrderedReader` of a local file that also hashes what is read.

    Args:
        hashing: the hash of the file; None hashes nothing.
    """

    def __init__(self, reader: FileReader, hashing: OrderedSha256 | None) -> None:
        self._reader = reader
        self._hashing = hashing
        self.needs_order = hashing is not None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._reader.read_into(buffer, offset)

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        """See `OrderedReader`. A block of several pieces is read again for the hash, when its time comes."""
        if data is not None and self._hashing is not None:
            self._hashing.feed(data, offset)

    def close(self) -> None:
        self._reader.close()
