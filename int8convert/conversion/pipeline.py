"""Shards, one after the other: read | quantize | write in as many threads as there are cores, the disk kept busy.

1. A shard's tensors are cut into row blocks, in the order of the file's bytes.
2. Each worker thread takes the next block, reads it, quantizes it, writes it. While one waits for the disk another
   computes; the kernels and the system calls hold no Python lock.
3. The finished shard is put on the disk and named by a thread of its own, while the next one is converted.

Memory: two buffers of a megabyte a thread, whatever the model's size, and the scales of the tensors in work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.writer import ShardWriter
from int8convert.conversion.events import Event, EventSink, ShardFinished, ShardStarted
from int8convert.conversion.plan import ConversionPlan, PlannedShard
from int8convert.conversion.tensors import BlockCounter, Scratch, tensor_task

Block = tuple[BlockCounter, int, int]


class Pipeline:
    """Converts planned shards into a directory. A context manager, for its threads.

    Args:
        out: an existing directory.
        n_workers: threads, at least 1.
        emit: told what happens, one event at a time.
    """

    def __init__(self, out: Path, n_workers: int, emit: EventSink) -> None:
        self._out = out
        self._sink = emit
        self._emit_lock = threading.Lock()
        self._scratches = [Scratch() for _ in range(n_workers)]
        self._workers = ThreadPoolExecutor(n_workers)
        self._committer = ThreadPoolExecutor(1)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.shutdown()
        self._committer.shutdown()

    def emit(self, event: Event) -> None:
        """Hand an event to the sink; from any thread."""
        with self._emit_lock:
            self._sink(event)

    def run(self, plan: ConversionPlan, converted: Mapping[int, ShardWriter]) -> None:
        """Write all shards. On any error the unfinished ones are removed, and the error goes on its way.

        Args:
            plan: what to do.
            converted: shards that are converted already and only have to be put on the disk.
        """
        n = len(plan.shards)
        commits: list[Future[None]] = []
        try:
            for i, shard in enumerate(plan.shards):
                if i in converted:
                    writer = converted[i]
                else:
                    self.emit(ShardStarted(i, n, shard))
                    writer = self.convert(shard, self.emit)
                commits.append(self._committer.submit(self._commit, i, n, shard, writer))
                if i > 0:
                    commits[i - 1].result()  # at most two shards unfinished, so at most two to redo
            for commit in commits:
                commit.result()
        finally:
            for writer in converted.values():
                writer.discard()

    def convert(
        self, shard: PlannedShard, emit: EventSink, keep_going: Callable[[], bool] = lambda: True
    ) -> ShardWriter:
        """Convert one shard, up to but not including its final name.

        Args:
            shard: what to do.
            emit: told of each tensor.
            keep_going: asked before each block; False gives the shard up.

        Raises:
            ShardAbandonedError: it was given up.
        """
        writer = ShardWriter(self._out / shard.file_name, shard.outputs)
        try:
            with ExitStack() as open_readers:
                blocks = _Blocks(shard, writer, open_readers, emit, keep_going)
                running = [self._workers.submit(blocks.work, scratch) for scratch in self._scratches]
                try:
                    for worker in running:
                        worker.result()
                except BaseException:
                    blocks.stop.set()
                    for worker in running:
                        worker.exception()
                    raise
            if not keep_going():
                raise ShardAbandonedError
        except BaseException:
            writer.discard()
            raise
        return writer

    def _commit(self, i: int, n: int, shard: PlannedShard, writer: ShardWriter) -> None:
        try:
            writer.commit()
        finally:
            writer.discard()
        self.emit(ShardFinished(i, n, shard))


class ShardAbandonedError(Exception):
    """A shard was given up because whoever asked for it no longer wants it. Never reaches the user."""


class _Blocks:
    """The blocks of one shard, in reading order, for several threads to take."""

    def __init__(
        self,
        shard: PlannedShard,
        writer: ShardWriter,
        open_readers: ExitStack,
        emit: EventSink,
        keep_going: Callable[[], bool],
    ) -> None:
        self.stop = threading.Event()
        self._emit = emit
        self._keep_going = keep_going
        self._lock = threading.Lock()
        self._blocks = self._cut(shard, writer, open_readers)

    def _cut(self, shard: PlannedShard, writer: ShardWriter, open_readers: ExitStack) -> Iterator[Block]:
        """Source shards are opened as they come up."""
        readers: dict[Path, ShardReader] = {}
        for tensor in shard.tensors:
            path = tensor.shard.path
            if path not in readers:
                readers[path] = tensor.shard.open()
                open_readers.callback(readers[path].close)
            task = tensor_task(tensor, readers[path], writer)
            ranges = list(task.blocks())
            counter = BlockCounter(task, len(ranges))
            for begin, end in ranges:
                yield counter, begin, end

    def work(self, scratch: Scratch) -> None:
        """Take and finish blocks until there are none; one call a thread."""
        while not self.stop.is_set() and self._keep_going():
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            counter, begin, end = block
            try:
                counter.task.run(begin, end, scratch)
                if counter.count_down():
                    self._emit(counter.task.finish())
            except BaseException:
                self.stop.set()
                raise
