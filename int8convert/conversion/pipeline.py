"""The plan, shard by shard: read | quantize | write in as many threads as there are cores, the disk kept busy.

1. A shard's tensors are cut into row blocks, in the order of the file's bytes.
2. Each worker thread takes the next block, reads it, quantizes it, writes it. While one waits for the disk another
   computes; the kernels and the system calls hold no Python lock.
3. The finished shard is put on the disk and named by a thread of its own, while the next one is converted.

Memory: two buffers of a megabyte a thread, whatever the model's size, and the scales of the tensors in work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from int8convert.checkpoint.source import ShardReader
from int8convert.checkpoint.writer import ShardWriter
from int8convert.conversion.events import EventSink, ShardFinished, ShardStarted
from int8convert.conversion.plan import ConversionPlan, PlannedShard
from int8convert.conversion.tensors import BlockCounter, Scratch, tensor_task

Block = tuple[BlockCounter, int, int]


class Pipeline:
    """Converts the shards of one plan into a directory.

    Args:
        plan: what to do.
        out: an existing directory.
        n_workers: threads, at least 1.
        emit: told what happens, one event at a time.
    """

    def __init__(self, plan: ConversionPlan, out: Path, n_workers: int, emit: EventSink) -> None:
        self._plan = plan
        self._out = out
        self._emit_lock = threading.Lock()
        self._sink = emit
        self._scratches = [Scratch() for _ in range(n_workers)]
        self._stop = threading.Event()

    def _emit(self, event: object) -> None:
        with self._emit_lock:
            self._sink(event)  # type: ignore[arg-type]

    def run(self) -> None:
        """Write all shards. On any error the unfinished ones are removed, and the error goes on its way."""
        n_workers = len(self._scratches)
        with ThreadPoolExecutor(n_workers) as workers, ThreadPoolExecutor(1) as committer:
            commits: list[Future[None]] = []
            try:
                for i, shard in enumerate(self._plan.shards):
                    writer = self._convert(i, shard, workers)
                    commits.append(committer.submit(self._commit, i, shard, writer))
                    if i > 0:
                        commits[i - 1].result()  # at most two shards unfinished, so at most two to redo
                for commit in commits:
                    commit.result()
            finally:
                self._stop.set()

    def _convert(self, i: int, shard: PlannedShard, workers: ThreadPoolExecutor) -> ShardWriter:
        self._emit(ShardStarted(i, len(self._plan.shards), shard))
        writer = ShardWriter(self._out / shard.file_name, shard.outputs)
        try:
            with ExitStack() as open_readers:
                blocks = self._blocks(shard, writer, open_readers)
                lock = threading.Lock()
                running = [workers.submit(self._work, blocks, lock, scratch) for scratch in self._scratches]
                try:
                    for worker in running:
                        worker.result()
                except BaseException:
                    self._stop.set()
                    for worker in running:
                        worker.exception()
                    raise
        except BaseException:
            writer.discard()
            raise
        return writer

    def _blocks(self, shard: PlannedShard, writer: ShardWriter, open_readers: ExitStack) -> Iterator[Block]:
        """The blocks of a shard in reading order; source shards are opened as they come up."""
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

    def _work(self, blocks: Iterator[Block], lock: threading.Lock, scratch: Scratch) -> None:
        while not self._stop.is_set():
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            counter, begin, end = block
            try:
                counter.task.run(begin, end, scratch)
                if counter.count_down():
                    self._emit(counter.task.finish())
            except BaseException:
                self._stop.set()
                raise

    def _commit(self, i: int, shard: PlannedShard, writer: ShardWriter) -> None:
        try:
            writer.commit()
        finally:
            writer.discard()
        self._emit(ShardFinished(i, len(self._plan.shards), shard))
