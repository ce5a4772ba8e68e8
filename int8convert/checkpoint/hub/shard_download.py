"""Shards that come as files: downloaded one ahead of the one that is read, and removed when they are done with.

1. A thread has the Hub's own client download the shards in order, by xet where there is xet, into a folder of ours. It
   stays one ahead, so that at most two are on the disk.
2. A shard is read as any local file is, and hashed on the way; at its end the hash must be the Hub's.
3. Then it is removed. What lies in the Hub's cache already is read there, and stays there; with a `cache_dir` all of it
   goes into that cache and stays.

The client continues a download that breaks off, but begins one anew that was killed, and leaves what it had: the folder
is emptied first.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hashing import OrderedSha256
from int8convert.checkpoint.hub.failures import PassingError, Patience, transfer_patience_s, translating_errors
from int8convert.checkpoint.hub.hub_file import HubFile
from int8convert.checkpoint.hub.repository import ContentCheck
from int8convert.checkpoint.hub.shard_stream import FetchProgress
from int8convert.checkpoint.hub.source import RemoteShard
from int8convert.checkpoint.layout import quoted
from int8convert.checkpoint.shard_access import DamagedShardError, HashingReader, LocalShards, OrderedReader
from int8convert.checkpoint.source import FileReader, SourceShard
from int8convert.errors import CorruptFileError, HubConnectionError, Int8ConvertError

MAX_ON_DISK = 2
_PIECE_BYTES = 1 << 20
_CLOSE_S = 0.5


class _Stopped(Exception):
    """Nobody wants the downloads any longer. Stays in its thread."""


class ShardDownload:
    """`ShardAccess` to shards on the Hub, in the order given.

    Args:
        shards: those that will be opened, in order.
        folder: made, emptied and removed; where shards lie while they are read.
        cache_dir: a cache to keep them in instead.
        distrusted: names of files that came with wrong bytes, so that a cache that has them is not believed.
        on_progress: called in the downloading thread.
    """

    def __init__(
        self,
        shards: Sequence[SourceShard],
        folder: Path,
        cache_dir: Path | None = None,
        distrusted: Collection[str] = (),
        on_progress: FetchProgress = lambda shard, n: None,
    ) -> None:
        self._shards = list(shards)
        self._folder = folder
        self._cache_dir = cache_dir
        self._on_progress = on_progress
        self._local = LocalShards()
        self._changed = threading.Condition()
        self._files: dict[str, Future[SourceShard]] = {shard.path.name: Future() for shard in shards}
        self._ended: dict[str, tuple[str, Exception | None]] = {}
        self._n_on_disk = 0
        self._distrusted = frozenset(distrusted)
        self._is_closed = False
        self._remove_folder()
        self._thread = threading.Thread(target=self._fetch_all, daemon=True)
        self._thread.start()

    def open(self, shard: SourceShard) -> OrderedReader:
        """See `ShardAccess`."""
        if shard.remote is None:
            return self._local.open(shard)
        there = self._there(shard)
        return _Reader(FileReader(there.path), self._local.hash_of(there), shard, self._end)

    def _there(self, shard: SourceShard) -> SourceShard:
        """The shard as a local file, once it is one."""
        return self._files[shard.path.name].result()

    def is_checked(self, shard: SourceShard) -> bool:
        """See `ShardAccess`."""
        return shard.remote is not None

    def finish(self, shard: SourceShard) -> str:
        """See `ShardAccess`."""
        if shard.remote is None:
            return self._local.finish(shard)
        if shard.path.name not in self._ended:
            self._end(shard)
        sha256, trouble = self._ended[shard.path.name]
        if trouble is not None:
            raise trouble
        return sha256

    def _end(self, shard: SourceShard) -> None:
        """Check a shard that was read, and remove it, which lets the next one come."""
        assert isinstance(shard.remote, RemoteShard)
        there, file = self._there(shard), shard.remote.file
        sha256 = self._local.hash_of(there).finish()
        trouble: Exception | None = None
        if not (sha256 == file.sha256 if file.sha256 else is_content(there.path, file)):
            trouble = DamagedShardError(shard, f"sha256 {sha256}, expected {file.sha256}")
        elif not _is_header(there.path, shard.remote):
            trouble = CorruptFileError(
                f"the header of {quoted(file.name)} was other when the conversion was planned than in the file itself",
                "it came with wrong bytes then; the same command plans anew",
            )
        self._ended[shard.path.name] = sha256, trouble
        self._remove(there.path)

    def _remove(self, path: Path) -> None:
        if path.is_relative_to(self._folder):
            path.unlink(missing_ok=True)
        with self._changed:
            self._n_on_disk -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """See `ShardAccess`. A download that is under way ends with the process, or by itself into nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)
        self._local.close()
        self._remove_folder()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

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
                path = self._fetch(shard)
                future.set_result(SourceShard(path, shard.n_bytes, shard.tensors))
            except _Stopped:
                future.set_exception(HubConnectionError("the download was stopped", "run the same command again"))
            except (Int8ConvertError, OSError) as error:
                future.set_exception(error)

    def _fetch(self, shard: SourceShard) -> Path:
        assert isinstance(shard.remote, RemoteShard)
        file = shard.remote.file
        patience = Patience(file.subject, transfer_patience_s())

        def on_bytes(n_bytes: int) -> None:
            if self._is_closed:
                raise _Stopped
            patience.progressed()
            self._on_progress(shard, n_bytes)

        while True:
            try:
                with translating_errors(file.repository):
                    return self._download(file, on_bytes)
            except PassingError as trouble:
                patience.wait(trouble, self._pause)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)
            if self._is_closed:
                raise _Stopped

    def _download(self, file: HubFile, on_bytes: Any) -> Path:
        from huggingface_hub import hf_hub_download

        was_wrong = file.name in self._distrusted
        cached = cached_path(file, self._cache_dir)
        if cached is not None and not was_wrong:
            return cached
        return Path(
            hf_hub_download(
                file.repository,
                file.name,
                revision=file.commit,
                cache_dir=self._cache_dir,
                local_dir=None if self._cache_dir else self._folder,
                force_download=was_wrong,
                tqdm_class=_counter_of(on_bytes),
            )
        )


class _Reader(HashingReader):
    """Ends its shard as soon as the last byte that is needed was read, so that it need not wait for the output."""

    def __init__(
        self, reader: FileReader, hashing: OrderedSha256, shard: SourceShard, on_end: Callable[[SourceShard], None]
    ) -> None:
        super().__init__(reader, hashing)
        self._shard = shard
        self._on_end = on_end

    def read_on(self, data: memoryview | None, offset: int, needed_from: int) -> None:
        """See `OrderedReader`."""
        super().read_on(data, offset, needed_from)
        if needed_from >= self._shard.n_bytes:
            self.close()  # or its disk would not be free
            self._on_end(self._shard)


def is_cached(shard: SourceShard, cache_dir: Path | None = None) -> bool:
    """Whether a shard need not be downloaded: it is local, or in the Hub's cache with the right size."""
    return not isinstance(shard.remote, RemoteShard) or cached_path(shard.remote.file, cache_dir) is not None


def cached_path(file: HubFile, cache_dir: Path | None = None) -> Path | None:
    """Where a file is in the Hub's cache, with the right size; None if it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repository, file.name, cache_dir, file.commit)
    return Path(found) if isinstance(found, str) and Path(found).stat().st_size == file.n_bytes else None


def _counter_of(on_bytes: Any) -> Any:
    """A progress bar for the Hub's client that shows nothing, and tells how many bytes have come."""
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._n_come = options.get("initial", 0) or 0

        def update(self, n: float | None = 1) -> None:
            self._n_come += n or 0
            on_bytes(int(self._n_come))

    return Counter


def is_content(path: Path, file: HubFile) -> bool:
    """Whether a local file has the bytes the Hub lists."""
    check = ContentCheck(file.n_bytes, file.sha256, file.blob_id)
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            check.feed(piece)
    return check.is_right


def _is_header(path: Path, remote: RemoteShard) -> bool:
    """Whether a file has the header that the plan was made from."""
    with path.open("rb") as file:
        for one in remote.evidence:
            file.seek(one.begin)
            if hashlib.sha256(file.read(one.end - one.begin)).digest() != one.sha256:
                return False
    return True
