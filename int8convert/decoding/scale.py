"""Scales and zero points that are read before the codes they belong to, which may be in another file."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Any, Protocol

import numpy.typing as npt

from int8convert.checkpoint.rows import read_whole
from int8convert.checkpoint.source import SourceShard, fetch_tensors, reading
from int8convert.checkpoint.stored_tensor import StoredTensor


class Scale(Protocol):
    """The scale, or the zero point, of one matrix of codes."""

    @property
    def stored(self) -> StoredTensor: ...

    @property
    def shard(self) -> SourceShard: ...


def read_scale(scale: Scale) -> npt.NDArray[Any]:
    """Return a scale's elements in their shape, as `rows.as_array` holds them."""
    with reading(scale.shard.path.name), closing(scale.shard.open()) as reader:
        return read_whole(scale.stored, reader)


def is_as_fetched(scale: Scale) -> bool:
    """Return whether a scale on the Hub arrives a second time as it did the first. Local scales do."""
    stored, remote = scale.stored, scale.shard.remote
    return remote is None or remote.refetch_matches([(stored.offset, stored.offset + stored.span_bytes)])


def fetch_scales(scales: Iterable[Scale]) -> None:
    fetch_tensors((scale.shard, scale.stored) for scale in scales)
