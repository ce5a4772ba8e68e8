"""Chooses how shards are read from the Hub: as a stream, or downloaded one by one.

A download uses several connections and the client's faster protocol, but two shards of the source lie beside the
output. A stream takes no disk. So free disk space decides, unless the user does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from int8convert.checkpoint.shard_access import LocalShards, ShardAccess
from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.scale import fetch_scales
from int8convert.errors import SourceError
from int8convert.events import Event, EventSink, SourceFetched
from int8convert.hub.download import MAX_ON_DISK, ShardDownload, is_cached, is_downloadable
from int8convert.hub.stream import ShardStream
from int8convert.planning.reading_order import MakeAccess, ReadingOrder
from int8convert.text import format_bytes

_RESERVED_BYTES = 1_000_000_000
"""Bytes of the disk that a download must leave free, unless the user asked for it."""

_MAX_PREFETCHED_BYTES = 8 << 30
"""Most bytes of scales that are held in memory. Those of 4-bit weights are 1/8 to 1/17 of a checkpoint."""

_REPORTED_BYTES = 4 << 20
"""Bytes fetched between two events: pieces come by the ten thousand a second."""


class Reader(StrEnum):
    """A way to read shards from the Hub, as the user names it."""

    AUTO = "auto"
    STREAM = "stream"
    DOWNLOAD = "download"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a repository on the Hub is read. Ignored for local sources.

    Attributes:
        cache_dir: a Hub cache that keeps downloads; None removes them after use.
        revision: a branch, a tag or a commit; None is the main branch.
    """

    reader: Reader = Reader.AUTO
    cache_dir: Path | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ReaderCosts:
    """The costs of one reader.

    Attributes:
        disk_bytes: the most bytes of disk beside the output; with a cache, all that it lacks.
        memory_bytes: memory beside that of a local conversion.
    """

    disk_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ReaderChoice:
    """The reader that is used.

    Attributes:
        costs: what it takes.
        reason: why, as a phrase that follows its name; "" if the user asked for it.
    """

    reader: Reader
    costs: ReaderCosts
    reason: str = ""


def stream_costs(order: ReadingOrder, n_workers: int) -> ReaderCosts:
    return ReaderCosts(0, order.window_bytes(n_workers) + order.prefetched_bytes)


def download_costs(order: ReadingOrder, cache_dir: Path | None) -> ReaderCosts:
    sizes = sorted(shard.n_bytes for shard in order.shards if not is_cached(shard, cache_dir))
    return ReaderCosts(sum(sizes if cache_dir is not None else sizes[-MAX_ON_DISK:]), order.prefetched_bytes)


def choose_reader(
    asked: Reader, order: ReadingOrder, n_workers: int, cache_dir: Path | None, free_bytes: int
) -> ReaderChoice:
    """Return the reader asked for, or the one that fits."""
    stream, download = stream_costs(order, n_workers), download_costs(order, cache_dir)
    if asked is Reader.STREAM:
        return ReaderChoice(asked, stream)
    if asked is Reader.DOWNLOAD:
        return ReaderChoice(asked, download)
    if order.shards and download.disk_bytes == 0:
        return ReaderChoice(Reader.DOWNLOAD, download, "all of it is in the cache")
    if not all(is_downloadable(shard.n_bytes) for shard in order.shards):
        return ReaderChoice(Reader.STREAM, stream, "a shard is larger than the Hub's client downloads without xet")
    if cache_dir is not None:
        return ReaderChoice(Reader.DOWNLOAD, download, "--cache-dir is to keep what is fetched")
    if free_bytes >= download.disk_bytes + _RESERVED_BYTES:
        return ReaderChoice(Reader.DOWNLOAD, download, "the disk has room for two of its shards beside the output")
    return ReaderChoice(Reader.STREAM, stream, "the disk has no room for two of its shards beside the output")


def access_maker(
    choice: ReaderChoice | None, reading: Reading, folder: Path, n_workers: int, emit: EventSink
) -> MakeAccess:
    """Return what gives the pipeline access to the shards of a reading order.

    Args:
        choice: None for shards that are local files.
        folder: for downloads that do not stay.
    """

    def make(order: ReadingOrder, distrusted: Collection[str]) -> ShardAccess:
        if choice is None:
            return LocalShards()
        if order.prefetched_bytes > _MAX_PREFETCHED_BYTES:
            raise SourceError(
                f"the scales of this repository take {format_bytes(order.prefetched_bytes)} of memory while its "
                f"weights come from the Hub, more than {format_bytes(_MAX_PREFETCHED_BYTES)}",
                "download the repository with `hf download`, and convert the folder",
            )
        fetch_scales(order.scales)
        on_event = _every_few_megabytes(order, emit)
        if choice.reader is Reader.DOWNLOAD:
            return ShardDownload(order.shards, folder, reading.cache_dir, frozenset(distrusted), on_event)
        first = [order.first_needed(shard) for shard in order.shards]
        return ShardStream(order.shards, first, order.window_bytes(n_workers), on_event)

    return make


def _every_few_megabytes(order: ReadingOrder, emit: EventSink) -> EventSink:
    """Return a sink that passes on an event for every `_REPORTED_BYTES`, and for the last byte of each shard."""
    sizes = {shard.path.name: shard.n_bytes for shard in order.shards}
    reported = -_REPORTED_BYTES

    def on_event(event: Event) -> None:
        nonlocal reported
        assert isinstance(event, SourceFetched)
        if not 0 <= event.n_bytes - reported < _REPORTED_BYTES or event.n_bytes == sizes.get(event.file_name):
            reported = event.n_bytes
            emit(event)

    return on_event


def is_remote(source: CheckpointSource) -> bool:
    return any(shard.remote is not None for shard in source.shards)
