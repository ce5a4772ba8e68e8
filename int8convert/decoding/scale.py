"""Scales that are read before the codes they belong to, which may lie in another file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from int8convert.checkpoint.source import SourceShard, fetch_tensors
from int8convert.checkpoint.stored_tensor import StoredTensor


class Scale(Protocol):
    """The scale of one matrix of codes."""

    @property
    def stored(self) -> StoredTensor: ...

    @property
    def shard(self) -> SourceShard: ...


def is_as_fetched(scale: Scale) -> bool:
    """Return whether a scale on the Hub arrives a second time as it did the first. Local scales do."""
    stored, remote = scale.stored, scale.shard.remote
    return remote is None or remote.refetch_matches([(stored.offset, stored.offset + stored.span_bytes)])


def fetch_scales(scales: Iterable[Scale]) -> None:
    """Fetch the scales that are on the Hub."""
    fetch_tensors((scale.shard, scale.stored) for scale in scales)
