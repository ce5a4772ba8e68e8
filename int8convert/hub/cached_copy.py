"""A repository's checkpoint as a directory of the Hub's cache, to run the model from.

Files in the cache are not fetched again; fetched files are compared with the hash the Hub lists. Only the Hub's client
writes into the cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from int8convert.checkpoint.file_reader import FileIdentity
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.errors import CorruptFileError, DiskFullError
from int8convert.events import DownloadStarted, EventSink, ignore
from int8convert.hub.local_copy import cached_path, has_content
from int8convert.hub.open_repository import RemoteShard
from int8convert.hub.remote_file import HubFile
from int8convert.hub.repository import find_repository
from int8convert.hub.retry import call_hub, transfer_budget
from int8convert.hub.small_files import discard_cached
from int8convert.text import quoted


def fetch_beside(source: CheckpointSource, names: Iterable[str]) -> frozenset[str]:
    """Fetch further files of a repository, as far as it has them, into the directory of its small files.

    Returns:
        the names of all files of the repository; without the network, of those in the cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        paths = (path for path in source.directory.rglob("*") if path.is_file())
        return frozenset(path.relative_to(source.directory).as_posix() for path in paths)
    repository = find_repository(source.label, source.commit)
    for name in names:
        if name in repository.files:
            file = repository.files[name]
            if cached_path(file) is None:
                _fetch(file)
    return frozenset(repository.files)


def reading_cached(source: CheckpointSource) -> CheckpointSource:
    """Return the same checkpoint, with shards that are in the Hub's cache read from there."""
    return replace(source, shards=tuple(map(_reading_cached, source.shards)))


def _reading_cached(shard: SourceShard) -> SourceShard:
    if not isinstance(shard.remote, RemoteShard):
        return shard
    path = cached_path(shard.remote.file)
    return shard if path is None else replace(shard, path=path, remote=None, identity=FileIdentity.of(path))


def fetch_checkpoint(source: CheckpointSource, on_event: EventSink = ignore) -> Path:
    """Fetch a repository's weights; return the directory of the Hub's cache with its config, weights and small files.

    Raises:
        HubError: a file cannot be fetched.
        DiskFullError: the cache's disk has too little room.
        CorruptFileError: a file has other bytes than the Hub lists.
    """
    from huggingface_hub import constants

    files = [shard.remote.file for shard in source.shards if isinstance(shard.remote, RemoteShard)]
    missing = [file for file in files if cached_path(file) is None]
    needed = sum(file.n_bytes for file in missing)
    free = shutil.disk_usage(source.directory).free
    if needed > free:
        raise DiskFullError(
            f"the Hub's cache '{constants.HF_HUB_CACHE}' needs {needed:,} bytes for {quoted(source.label)}, "
            f"its disk has {free:,} free",
            "set HF_HOME to a larger disk, or make room; --level exact needs none",
        )
    for file in missing:
        on_event(DownloadStarted(file.name, file.n_bytes))
        _fetch(file)
    return source.directory


def _fetch(file: HubFile) -> None:
    from huggingface_hub import hf_hub_download

    def download() -> Path:
        return Path(hf_hub_download(file.repository, file.name, revision=file.commit))

    path = call_hub(download, transfer_budget(file.subject), file.repository)
    if not has_content(path, file):
        discard_cached(path)
        raise CorruptFileError(
            f"{quoted(file.name)} of {quoted(file.repository)} came with other bytes than the Hub lists",
            "it was removed; run the same command again to fetch it",
        )
