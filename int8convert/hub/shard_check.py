"""Judges a shard from the Hub once all of its bytes have arrived."""

from __future__ import annotations

from dataclasses import dataclass

from int8convert.checkpoint.shard_access import DamagedShardError
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import CorruptFileError
from int8convert.hub.open_repository import RemoteShard
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """The comparison of a shard's bytes with what was expected.

    Attributes:
        content_matches: they have the hash that the Hub lists.
        header_matches: they hold the header from which the conversion was planned.
        prefetched_matches: they hold the ranges that were fetched beforehand.
    """

    sha256: str
    content_matches: bool
    header_matches: bool
    prefetched_matches: bool

    def sha256_of(self, shard: SourceShard) -> str:
        """Return the sha256 if everything matches.

        Raises:
            DamagedShardError: the bytes differ, and fetching them again may help.
            CorruptFileError: the conversion was planned from another header.
        """
        assert isinstance(shard.remote, RemoteShard)
        if not self.content_matches:
            raise DamagedShardError(shard, f"sha256 {self.sha256}, expected {shard.remote.sha256}")
        if not self.prefetched_matches:
            shard.remote.prefetched.forget()
            raise DamagedShardError(shard, "a range that was fetched beforehand differs")
        if not self.header_matches:
            raise CorruptFileError(
                f"the header of {quoted(shard.path.name)} differs from the one the conversion was planned from",
                "run the same command again; it plans from the new header",
            )
        return self.sha256
