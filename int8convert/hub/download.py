"""Shards that come as files: downloaded one ahead of the one that is read, and removed when they are done with.

1. A thread has the Hub's own client download the shards in order, by xet where there is xet, into a folder of ours. It
   stays one ahead, so that at most two are on the disk.
2. A shard is read as any local file is, and hashed on the way.
3. When its last byte that is needed was read, the rest is hashed and the shard removed, though whoever reads it may
   ask much later whether the hash was the Hub's: an output shard may be made of many. What lies in the Hub's cache
   already is read there, and stays there; with a `cache_dir` all of it goes into that cache and stays.

The client continues a download that breaks off, but begins one anew that was killed, and leaves what it had: the folder
is emptied first.
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
from int8convert.checkpoint.shard_access import DamagedShardError, HashingReader, LocalShards, OrderedReader
from int8convert.checkpoint.source import SourceShard
from int8convert.errors import DiskFullError, HubConnectionError, HubError, OutputError
from int8convert.events import EventSink, SourceFetched, ignore
from int8convert.hub.byte_counter import is_too_long
from int8convert.hub.errors import translating_client_errors
from int8convert.hub.local_copy import cached_path, download_file, holds_evidence, is_content, is_in_cache
from int8convert.hub.open_repository import RemoteShard
from int8convert.hub.remote_file import HubFile
from int8convert.hub.retry import PassingError, Patience, transfer_patience_s
from int8convert.hub.shard_check import ShardCheck
from int8convert.text import quoted

MAX_ON_DISK = 2
_CLOSE_S = 0.5


_folder_numbers = itertools.count()


class _Stopped(Exception):
    """Nobody wants the downloads any longer. Stays in its thread."""


class ShardDownload:
    """`ShardAccess` to shards on the Hub, in the order given.

    Args:
        shards: those that will be opened, in order.
        folder: made, emptied and removed; where shards lie while they are read.
        cache_dir: a cache to keep them in instead.
        distrusted: names of files that came with wrong bytes, so that a cache that has them is not believed.
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
        # The client gives paths without links. A thread of an access that was closed may still be at work in its own.
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
        """See `ShardAccess`."""
        there = self._there(shard)
        reader = HashingReader(FileReader(there.path, there.identity), self._local.hash_of(there))
        return reader if shard.remote is None else _DownloadReader(self, shard, reader)

    def _there(self, shard: SourceShard) -> SourceShard:
        """The shard as a local file, once it is one."""
        return self._files[shard.path.name].result() if shard.remote is not None else shard

    def is_checked(self, shard: SourceShard) -> bool:
        """See `ShardAccess`."""
        return shard.remote is not None

    def finish(self, shard: SourceShard) -> str:
        """See `ShardAccess`."""
        if not isinstance(shard.remote, RemoteShard):
            return self._local.finish(shard)
        name = shard.path.name
        if name not in self._checks:
            self.check(shard)
        return self._checks.pop(name).sha256_of(shard)

    def check(self, shard: SourceShard) -> None:
        """Hash what is left of a shard on the Hub that nobody will read any more, and remove it."""
        assert isinstance(shard.remote, RemoteShard)
        there, file = self._there(shard), shard.remote.file
        sha256 = self._local.hash_of(there).finish()
        is_right = sha256 == file.sha256 if file.sha256 else is_content(there.path, file)
        is_kept = holds_evidence(there.path, shard.remote.evidence)
        is_known = holds_evidence(there.path, shard.remote.known.evidence())
        self._checks[shard.path.name] = ShardCheck(sha256, is_right, is_kept, is_known)
        if there.path.is_relative_to(self._folder):
            there.path.unlink(missing_ok=True)
        with self._changed:
            self._n_on_disk -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """See `ShardAccess`. A download that is under way ends with the process, or by itself into nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for future in self._files.values():
            self._settle(future, _stopped())
        self._thread.join(_CLOSE_S)
        self._local.close()
        shutil.rmtree(self._incoming, ignore_errors=True)

    def _settle(self, future: Future[SourceShard], outcome: SourceShard | BaseException) -> None:
        """Have whoever waits for a shard get it, or an error; once."""
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
                        raise _Stopped
                    self._n_on_disk += 1
                self._settle(future, SourceShard(self._fetch(shard), shard.n_bytes, shard.tensors))
            except _Stopped:
                self._settle(future, _stopped())
            except BaseException as error:  # whoever waits for the shard raises it; without one it would wait for ever
                self._settle(future, error)
        if self._is_closed:  # and what was under way then has come since
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # unless another access is at work there
                self._incoming.rmdir()
                self._incoming.parent.rmdir()

    def _fetch(self, shard: SourceShard) -> Path:
        assert isinstance(shard.remote, RemoteShard)
        file = shard.remote.file
        patience = Patience(file.subject, transfer_patience_s())

        failures: list[BaseException] = []
        farthest = 0

        def on_bytes(n_bytes: int) -> None:
            if self._is_closed:
                raise _Stopped
            if is_too_long(n_bytes, shard.n_bytes):
                failures.append(DamagedShardError(shard, "the server sends more bytes than the Hub lists"))
                raise _Stopped
            nonlocal farthest
            if n_bytes > farthest:  # what comes once more, after it all began anew, is no progress
                farthest = n_bytes
                patience.progressed()
            try:
                self._on_event(SourceFetched(shard.path.name, n_bytes))
            except BaseException as error:  # no trouble of the client's, within which it is raised
                failures.append(error)
                raise _Stopped from error

        while True:
            try:
                with translating_client_errors(file.repository):
                    return self._download(file, on_bytes)
            except PassingError as trouble:
                if failures:
                    raise failures[0] from None
                patience.wait(trouble, self._pause)
            except _Stopped:
                raise (failures or [_Stopped()])[0] from None
            except OSError as error:
                raise self._local_error(error, file) from error

    def _local_error(self, error: OSError, file: HubFile) -> OutputError:
        folder = self._cache_dir or self._folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DiskFullError(
                f"no room left in '{folder}' while downloading {quoted(file.name)}, {file.n_bytes:,} bytes",
                "--reader stream needs none; or make room, and rerun the same command",
            )
        return OutputError(
            f"'{error.filename or folder}' cannot be written: {error.strerror}", "mend that and rerun the same command"
        )

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)
            if self._is_closed:
                raise _Stopped

    def _download(self, file: HubFile, on_bytes: Callable[[int], None]) -> Path:
        was_wrong = file.name in self._distrusted
        cached = cached_path(file, self._cache_dir)
        if cached is not None and not was_wrong:
            return cached
        if not is_downloadable(file.n_bytes):
            raise HubError(
                f"{quoted(file.name)} of {quoted(file.repository)} has {file.n_bytes:,} bytes, and the Hub's client "
                "downloads that much by xet alone, which is off or not installed",
                "pass --reader stream; or leave out --no-xet, and install hf_xet",
            )
        local_dir = None if self._cache_dir else self._folder
        is_forced = was_wrong or is_in_cache(file, self._cache_dir)  # or the client would take it from there
        return download_file(file, self._cache_dir, local_dir, is_forced=is_forced, on_bytes=on_bytes)


class _DownloadReader:
    """An `OrderedReader` of a downloaded shard, which is removed when it is read to its end."""

    def __init__(self, download: ShardDownload, shard: SourceShard, reader: HashingReader) -> None:
        self._download = download
        self._shard = shard
        self._reader = reader

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ShardReader`."""
        self._reader.read_into(buffer, offset)

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        """See `OrderedReader`."""
        self._reader.read_on(data, offset, needed_from)
        if needed_from >= self._shard.n_bytes:
            self._reader.close()  # a file that is open keeps its room on the disk
            self._download.check(self._shard)

    def close(self) -> None:
        """See `ShardReader`."""
        self._reader.close()


def _stopped() -> HubConnectionError:
    return HubConnectionError("the download was stopped", "run the same command again")


def is_downloadable(n_bytes: int) -> bool:
    """Whether the client can download a file of that size: very large ones it has by xet only."""
    from huggingface_hub import constants

    has_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    return has_xet or n_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE


def is_cached(shard: SourceShard, cache_dir: Path | None = None) -> bool:
    """Whether a shard need not be downloaded: it is local, or in the Hub's cache with the right size."""
    return not isinstance(shard.remote, RemoteShard) or cached_path(shard.remote.file, cache_dir) is not None
