"""What a shard from the Hub turned out to be, once all of its bytes have come."""

from __future__ import annotations

from dataclasses import dataclass

from int8convert.checkpoint.shard_access import DamagedShardError
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import CorruptFileError
from int8convert.hub.open_repository import RemoteShard
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """Compares what came with what the Hub lists, and with what came before.

    Attributes:
        sha256: of what came, in hex.
        is_right: whether that is what the Hub lists.
        is_kept: whether the header is the one the plan was made from.
        is_known: whether the parts that were fetched beforehand are in it.
    """

    sha256: str
    is_right: bool
    is_kept: bool
    is_known: bool

    def sha256_of(self, shard: SourceShard) -> str:
        """The sha256, if all is well.

        Raises:
            DamagedShardError: it is not, and fetching again may help.
            CorruptFileError: the plan was made from another header.
        """
        assert isinstance(shard.remote, RemoteShard)
        if not self.is_right:
            raise DamagedShardError(shard, f"sha256 {self.sha256}, expected {shard.remote.sha256}")
        if not self.is_known:
            shard.remote.known.forget()
            raise DamagedShardError(shard, "a part of it that was fetched before was another one")
        if not self.is_kept:
            raise CorruptFileError(
                f"the header of {quoted(shard.path.name)} was other when the conversion was planned than in the file "
                "itself",
                "it came with wrong bytes then; the same command plans anew",
            )
        return self.sha256
