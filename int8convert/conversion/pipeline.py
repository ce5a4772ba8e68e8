"""Shards, one after the other: read | hash | quantize | write, in as many threads as there are cores.

1. A shard's tensors are cut into row blocks, in the order of the file's bytes.
2. Each worker thread takes the next block, reads it, adds it to the source's sha256 when its turn comes, quantizes it,
   writes it. While one waits for the disk or its turn another computes; kernels, hashing and system calls hold no
   Python lock.
3. The finished shard is hashed, put on the disk, named and written down by a thread of its own, while the next one is
   converted.

Memory: two buffers of a megabyte a thread and the chunks on their way to the disk, whatever the model's size, and the
scales of the tensors in work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from int8convert.checkpoint.hashing import OrderedSha256, expected_sha256
from int8convert.checkpoint.manifest import Manifest, ShardRecord, TensorRecord
from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.writer import ShardWriter
from int8convert.conversion.blocks import Scratch
from int8convert.conversion.device import CPU, Device, make_scratch
from int8convert.conversion.events import (
    Event,
    EventSink,
    ShardFinished,
    ShardSkipped,
    ShardStarted,
    TensorKept,
    TensorQuantized,
)
from int8convert.conversion.plan import ConversionPlan, PlannedShard
from int8convert.conversion.records import replay_events, tensor_record
from int8convert.conversion.tensors import BlockCounter, tensor_task
from int8convert.errors import CorruptFileError, SourceError


class ShardAbandonedError(Exception):
    """A shard was given up because whoever asked for it no longer wants it. Never reaches the user."""


class ConvertedShard:
    """A shard whose bytes are written under a temporary name, and what is to be written down of it."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self.tensors: dict[str, TensorRecord] = {}

    def write_down(self, event: TensorQuantized | TensorKept) -> None:
        """Keep what became of a tensor, for the shard's record."""
        name, record = tensor_record(event)
        self.tensors[name] = record

    def discard(self) -> None:
        """Remove what was written; harmless once it has its name."""
        self.writer.discard()


class Pipeline:
    """Converts planned shards into a directory. A context manager, for its threads and open files.

    Args:
        manifest: where finished shards are written down.
        out: the directory, which exists.
        n_workers: threads, at least 1.
        emit: told what happens, one event at a time.
        device: where rows are quantized; an attribute, too.
    """

    def __init__(self, manifest: Manifest, out: Path, n_workers: int, emit: EventSink, device: Device = CPU) -> None:
        self.device = device
        self._manifest = manifest
        self._out = out
        self._sink = emit
        self._emit_lock = threading.Lock()
        self._scratches = [make_scratch(device) for _ in range(n_workers)]
        self._workers = ThreadPoolExecutor(n_workers)
        self._committer = ThreadPoolExecutor(1)
        self._hashes: dict[Path, OrderedSha256] = {}

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.shutdown()
        self._committer.shutdown()
        for hashing in self._hashes.values():
            hashing.close()

    def emit(self, event: Event) -> None:
        """Hand an event to the sink; from any thread."""
        with self._emit_lock:
            self._sink(event)

    def run(
        self, plan: ConversionPlan, done: Mapping[str, ShardRecord], converted: Mapping[int, ConvertedShard]
    ) -> list[ShardRecord]:
        """Bring all shards to the disk. On any error the unfinished ones are removed, and the error goes on its way.

        Args:
            plan: what to do.
            done: file name -> record of the shards finished in an earlier run.
            converted: shards that only have to be put on the disk.

        Returns:
            the records of all shards, in order.
        """
        n = len(plan.shards)
        last_use = {tensor.shard.path: i for i, shard in enumerate(plan.shards) for tensor in shard.tensors}
        commits: list[Future[ShardRecord]] = []
        try:
            for i, shard in enumerate(plan.shards):
                if shard.file_name in done:
                    self._skip(i, n, shard, done[shard.file_name])
                    commits.append(_already(done[shard.file_name]))
                    continue
                if i not in converted:
                    self.emit(ShardStarted(i, n, shard))
                one = converted[i] if i in converted else self.convert(shard, self.emit)
                sources = sorted(path for path, last in last_use.items() if last == i)
                commits.append(self._committer.submit(self._commit, i, n, shard, one, sources))
                if i > 0:
                    commits[i - 1].result()  # at most two shards unfinished, so at most two to redo
            return [commit.result() for commit in commits]
        finally:
            wait(commits)  # until then the committer's thread owns the shards it was given
            for one in converted.values():
                one.discard()

    def _skip(self, i: int, n: int, shard: PlannedShard, record: ShardRecord) -> None:
        self.emit(ShardSkipped(i, n, shard))
        for event in replay_events(shard, record):
            self.emit(event)

    def convert(
        self, shard: PlannedShard, emit: EventSink, keep_going: Callable[[], bool] = lambda: True
    ) -> ConvertedShard:
        """Convert one shard, up to but not including its final name.

        Args:
            shard: what to do.
            emit: told of each tensor.
            keep_going: asked before each block; False gives the shard up.

        Raises:
            ShardAbandonedError: it was given up.
        """
        one = ConvertedShard(ShardWriter(self._out / shard.file_name, shard.outputs))
        try:
            with ExitStack() as open_readers:
                blocks = _Blocks(shard, one, open_readers, self._hash_of, emit, keep_going)
                running = [self._workers.submit(blocks.work, scratch) for scratch in self._scratches]
                try:
                    for worker in running:
                        worker.result()
                except BaseException:
                    blocks.turns.close()
                    for worker in running:
                        worker.exception()
                    raise
            if not keep_going():
                raise ShardAbandonedError
        except BaseException:
            one.discard()
            raise
        return one

    def _hash_of(self, path: Path) -> OrderedSha256:
        if path not in self._hashes:
            self._hashes[path] = OrderedSha256(path)
        return self._hashes[path]

    def _commit(self, i: int, n: int, shard: PlannedShard, one: ConvertedShard, sources: list[Path]) -> ShardRecord:
        """Check what was read, put the shard on the disk under its name, and write it down; in this order."""
        try:
            read = {path.name: self._checked_sha256(path) for path in sources}
            sha256 = one.writer.commit()
        finally:
            one.discard()
        tensors = {name: one.tensors[name] for name in sorted(one.tensors)}
        record = ShardRecord(shard.file_name, one.writer.n_bytes, sha256, shard.digest(), read, tensors)
        self._manifest.add(record)
        self.emit(ShardFinished(i, n, shard))
        return record

    def _checked_sha256(self, path: Path) -> str:
        with _reading(path.name):
            found = self._hash_of(path).finish()
        expected = expected_sha256(path)
        if expected is not None and found != expected:
            raise CorruptFileError(
                f"'{path.name}' has sha256 {found}, expected {expected}, as the client that fetched it wrote down",
                "fetch this file again and rerun the same command",
            )
        return found


def _already(record: ShardRecord) -> Future[ShardRecord]:
    future: Future[ShardRecord] = Future()
    future.set_result(record)
    return future


@contextmanager
def _reading(file_name: str) -> Iterator[None]:
    """Tells trouble with the source from trouble with the output: both are OSErrors."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"'{file_name}' of the source cannot be read: {error.strerror}",
            "see that the source is still there and its disk is well, and rerun the same command",
        ) from error


class _Turns:
    """Lets threads through one at a time, in the order of their numbers."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()
        self.is_closed = False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Waits for the turn of `number`; once closed, all go at once."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or self._next == number)
        yield
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()


class _Blocks:
    """The blocks of one shard, in reading order, for several threads to take."""

    def __init__(
        self,
        shard: PlannedShard,
        one: ConvertedShard,
        open_readers: ExitStack,
        hash_of: Callable[[Path], OrderedSha256],
        emit: EventSink,
        keep_going: Callable[[], bool],
    ) -> None:
        self.turns = _Turns()
        self._shard = shard
        self._one = one
        self._hash_of = hash_of
        self._emit = emit
        self._keep_going = keep_going
        self._lock = threading.Lock()
        self._blocks = enumerate(self._cut(open_readers))

    def _cut(self, open_readers: ExitStack) -> Iterator[tuple[BlockCounter, OrderedSha256, int, int]]:
        """Source shards are opened as they come up."""
        opened: dict[Path, tuple[ShardReader, OrderedSha256]] = {}
        for tensor in self._shard.tensors:
            path = tensor.shard.path
            if path not in opened:
                with _reading(path.name):
                    reader = tensor.shard.open()
                    open_readers.callback(reader.close)
                    opened[path] = reader, self._hash_of(path)
            reader, hashing = opened[path]
            task = tensor_task(tensor, reader, self._one.writer)
            ranges = list(task.blocks())
            counter = BlockCounter(task, len(ranges))
            for begin, end in ranges:
                yield counter, hashing, begin, end

    def work(self, scratch: Scratch) -> None:
        """Take and finish blocks until there are none; one call a thread."""
        try:
            while not self.turns.is_closed and self._keep_going():
                if not self._work_on_one(scratch):
                    return
        except BaseException:
            self.turns.close()
            raise

    def _work_on_one(self, scratch: Scratch) -> bool:
        with self._lock:
            number, block = next(self._blocks, (0, None))
        if block is None:
            return False
        counter, hashing, begin, end = block
        with _reading(counter.task.file_name):
            raw = counter.task.read(begin, end, scratch)
        with self.turns.turn(number), _reading(counter.task.file_name):
            if not self.turns.is_closed and raw.offset is not None:  # else it is read again for the hash
                hashing.feed(raw.data.data, raw.offset)
        counter.task.convert(raw, begin, end, scratch)  # last: nobody has to wait for it
        if counter.count_down():
            event = counter.task.finish()
            self._one.write_down(event)
            self._emit(event)
        return True
