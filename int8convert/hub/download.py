"""Shards as files: downloaded one ahead of the one that is read, and removed after use.

1. A thread downloads the shards in order with the Hub's client, by xet where it is installed, into a folder of ours. At
   most two are on the disk.
2. A shard is read as any local file, and hashed on the way.
3. After its last needed byte was read, the rest is hashed and the shard removed. The outcome is kept: an output shard
   may be made of many source shards, and `finish` asks for it later.
Shards in the Hub's cache are read there and stay. With a `cache_dir` all shards go into that cache and stay.

The client resumes a download that breaks off, but not one whose process was killed; so the folder is emptied first.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path

from int8convert.checkpoint.file_reader import FileReader
from int8convert.checkpoint.shard_access import DamagedShardError, LocalReader, LocalShards, OrderedReader
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import DiskFullError, HubConnectionError, HubError, OutputError
from int8convert.events import EventSink, SourceFetched, ignore
from int8convert.hub.errors import TransientError, translating_client_errors
from int8convert.hub.local_copy import (
    cached_path,
    download_file,
    has_content,
    is_in_cache,
    is_too_long,
    matches_digests,
)
from int8convert.hub.open_repository import RemoteShard
from int8convert.hub.remote_file import HubFile
from int8convert.hub.retry import retrying, transfer_budget
from int8convert.hub.shard_check import ShardCheck
from int8convert.text import quoted

MAX_ON_DISK = 2
_CLOSE_S = 0.5
_folder_numbers = itertools.count()


class _StoppedError(Exception):
    """Ends the downloading thread after `close`. Stays in the thread."""


class ShardDownload:
    """`ShardAccess` to shards on the Hub.

    Args:
        folder: the directory for shards while they are read; created, emptied and removed.
        cache_dir: a cache to keep the shards in instead.
        distrusted: names of files that arrived with wrong bytes; copies in a cache are not used for them.
        on_event: receives `SourceFetched`, in the downloading thread.
    """

    def __init__(
        self,
        shards: Sequence[SourceShard],
        folder: Path,
        cache_dir: Path | None = None,
        distrusted: Collection[str] = (),
        on_event: EventSink = ignore,
    ) -> None:
        self._shards = list(shards)
        # Resolved, as the client resolves its paths. Numbered, as a thread may outlive its own `close`.
        self._incoming = folder.resolve()
        self._folder = self._incoming / str(next(_folder_numbers))
        self._cache_dir = cache_dir
        self._on_event = on_event
        self._local = LocalShards()
        self._changed = threading.Condition()
        self._files: dict[str, Future[SourceShard]] = {shard.path.name: Future() for shard in shards}
        self._checks: dict[str, ShardCheck] = {}
        self._n_on_disk = 0
        self._distrusted = frozenset(distrusted)
        self._is_closed = False
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._thread = threading.Thread(target=self._fetch_all, daemon=True)
        self._thread.start()

    def open(self, shard: SourceShard) -> OrderedReader:
        local = self._local_shard(shard)
        reader = LocalReader(FileReader(local.path, local.identity), self._local.hash_of(local))
        return reader if shard.remote is None else _DownloadReader(self, shard, reader)

    def _local_shard(self, shard: SourceShard) -> SourceShard:
        """Wait for the shard's download; return it as a local file."""
        return self._files[shard.path.name].result() if shard.remote is not None else shard

    def is_checked(self, shard: SourceShard) -> bool:
        return shard.remote is not None

    def finish(self, shard: SourceShard) -> str | None:
        if not isinstance(shard.remote, RemoteShard):
            return self._local.finish(shard)
        name = shard.path.name
        if name not in self._checks:
            self.check(shard)
        return self._checks.pop(name).sha256_of(shard)

    def check(self, shard: SourceShard) -> None:
        """Hash the rest of a remote shard that is read no more, keep the outcome, and remove the file."""
        assert isinstance(shard.remote, RemoteShard)
        local, file = self._local_shard(shard), shard.remote.file
        sha256 = self._local.hash_of(local).finish()
        self._checks[shard.path.name] = ShardCheck(
            sha256,
            content_matches=sha256 == file.sha256 if file.sha256 else has_content(local.path, file),
            header_matches=matches_digests(local.path, shard.remote.header_digests),
            prefetched_matches=matches_digests(local.path, shard.remote.prefetched.digests()),
        )
        if local.path.is_relative_to(self._folder):
            local.path.unlink(missing_ok=True)
        with self._changed:
            self._n_on_disk -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """See `ShardAccess`. A download that is under way is discarded when it ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for future in self._files.values():
            self._settle(future, _stopped())
        self._thread.join(_CLOSE_S)
        self._local.close()
        shutil.rmtree(self._incoming, ignore_errors=True)

    def _settle(self, future: Future[SourceShard], outcome: SourceShard | BaseException) -> None:
        """Resolve a shard's future with the local shard or an error. Idempotent."""
        with self._changed:
            if future.done():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _fetch_all(self) -> None:
        for shard in self._shards:
            if shard.remote is None:
                continue
            future = self._files[shard.path.name]
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._n_on_disk < MAX_ON_DISK)
                    if self._is_closed:
                        raise _StoppedError
                    self._n_on_disk += 1
                self._settle(future, SourceShard(self._fetch(shard), shard.n_bytes, shard.tensors))
            except _StoppedError:
                self._settle(future, _stopped())
            except BaseException as error:  # raised to the readers, which would wait forever
                self._settle(future, error)
        if self._is_closed:  # discard what arrived after `close`
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another access may be using the parents
                self._incoming.rmdir()
                self._incoming.parent.rmdir()

    def _fetch(self, shard: SourceShard) -> Path:
        assert isinstance(shard.remote, RemoteShard)
        file = shard.remote.file
        budget = transfer_budget(file.subject)
        failures: list[BaseException] = []
        farthest = 0

        def on_bytes(n_bytes: int) -> None:
            """Called within the client, which may translate what is raised here. So errors are put aside first."""
            nonlocal farthest
            if self._is_closed:
                raise _StoppedError
            if is_too_long(n_bytes, shard.n_bytes):
                failures.append(DamagedShardError(shard, "the server sends more bytes than the Hub lists"))
                raise _StoppedError
            if n_bytes > farthest:  # bytes that arrive again after a restart are no progress
                farthest = n_bytes
                budget.progressed()
            try:
                self._on_event(SourceFetched(shard.path.name, n_bytes))
            except BaseException as error:
                failures.append(error)
                raise _StoppedError from error

        def attempt() -> Path:
            try:
                with translating_client_errors(file.repository):
                    return self._download(file, on_bytes)
            except TransientError:
                if failures:
                    raise failures[0] from None
                raise
            except _StoppedError:
                raise (failures or [_StoppedError()])[0] from None
            except OSError as error:
                raise self._local_error(error, file) from error

        return retrying(attempt, budget, self._pause)

    def _local_error(self, error: OSError, file: HubFile) -> OutputError:
        folder = self._cache_dir or self._folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFullError(
                f"no room left in '{folder}' while downloading {quoted(file.name)}, {file.n_bytes:,} bytes",
                "make room, or pass --reader stream, which needs none",
            )
        return OutputError(
            f"'{error.filename or folder}' cannot be written: {error.strerror}",
            "make it writable, then run the same command again",
        )

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._is_closed, seconds):
                raise _StoppedError

    def _download(self, file: HubFile, on_bytes: Callable[[int], None]) -> Path:
        is_distrusted = file.name in self._distrusted
        cached = cached_path(file, self._cache_dir)
        if cached is not None and not is_distrusted:
            return cached
        if not is_downloadable(file.n_bytes):
            raise HubError(
                f"{quoted(file.name)} of {quoted(file.repository)} has {file.n_bytes:,} bytes; the Hub's client "
                "downloads that much by xet alone, which is off or not installed",
                "pass --reader stream; or install hf_xet and leave out --no-xet",
            )
        local_dir = None if self._cache_dir else self._folder
        # A copy of the wrong size, too: the client would return it.
        is_forced = is_distrusted or is_in_cache(file, self._cache_dir)
        return download_file(file, self._cache_dir, local_dir, is_forced=is_forced, on_bytes=on_bytes)


class _DownloadReader:
    """An `OrderedReader` of a downloaded shard. It removes the shard after its last needed byte."""

    needs_order = True

    def __init__(self, download: ShardDownload, shard: SourceShard, reader: LocalReader) -> None:
        self._download = download
        self._shard = shard
        self._reader = reader

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self._reader.read_into(buffer, offset)

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        self._reader.read_on(data, offset, needed_from)
        if needed_from >= self._shard.n_bytes:
            self._reader.close()  # an open file would keep its space on the disk
            self._download.check(self._shard)

    def close(self) -> None:
        self._reader.close()


def _stopped() -> HubConnectionError:
    return HubConnectionError("the download was stopped", "run the same command again")


def is_downloadable(n_bytes: int) -> bool:
    """Return whether the client can download a file of that size. Above 50 GB it needs xet."""
    from huggingface_hub import constants

    has_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return has_xet or n_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE


def is_cached(shard: SourceShard, cache_dir: Path | None = None) -> bool:
    """Return whether a shard is local, or in the Hub's cache with the right size."""
    return not isinstance(shard.remote, RemoteShard) or cached_path(shard.remote.file, cache_dir) is not None
