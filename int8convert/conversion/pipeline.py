"""Shards, one after the other: read | hash | quantize | write, in as many threads as there are cores.

1. A shard's tensors are cut into row blocks, in the order of the file's bytes.
2. Each worker thread takes the next block, reads it, adds it to the source's sha256 when its turn comes, quantizes it,
   writes it. While one waits for the source, the disk or its turn another computes; kernels, hashing and system calls
   hold no Python lock.
3. The finished shard is put on the disk, named and written down by a thread of its own (`committer`), while the next
   one is converted. At most two shards are unfinished, so at most two are to be redone; more only where one source
   shard, whose bytes are checked at its end, makes many.

Memory: two buffers of a megabyte a thread and the chunks on their way to the disk, whatever the model's size, and the
scales of the tensors in work.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.names import quoted
from int8convert.checkpoint.shard_access import DamagedShardError, LocalShards, ShardAccess
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.conversion.commit import AfterCommit, Committer, ConvertedShard
from int8convert.conversion.device import CPU, Device, make_scratch
from int8convert.conversion.records import replay_events
from int8convert.conversion.shard_blocks import ShardBlocks
from int8convert.errors import CorruptFileError, NonFiniteWeightError
from int8convert.events import Event, EventSink, ShardRepeated, ShardSkipped, ShardStarted
from int8convert.planning.plan import ConversionPlan, PlannedShard
from int8convert.planning.reading_order import MakeAccess, ReadingOrder

_TRIES = 3
"""For a source shard that comes with wrong bytes."""


class Pipeline:
    """Converts planned shards into a directory. A context manager, for its threads and open files.

    Args:
        manifest: where finished shards are written down.
        out: the directory, which exists.
        n_workers: threads, at least 1.
        emit: told what happens, one event at a time.
        device: where rows are quantized.

    Attributes:
        n_workers, device: as given.
        access: to the source's shards; of a local source as long as nobody sets another one.
    """

    def __init__(self, manifest: Manifest, out: Path, n_workers: int, emit: EventSink, device: Device = CPU) -> None:
        self.device = device
        self.n_workers = n_workers
        self.access: ShardAccess = LocalShards()
        self._manifest = manifest
        self._out = out
        self._sink = emit
        self._emit_lock = threading.Lock()
        self._scratches = [make_scratch(device) for _ in range(n_workers)]
        self._workers = ThreadPoolExecutor(n_workers)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.shutdown()
        self.access.close()

    def emit(self, event: Event) -> None:
        """Hand an event to the sink; from any thread."""
        with self._emit_lock:
            self._sink(event)

    def run(
        self,
        plan: ConversionPlan,
        done: Mapping[str, ShardRecord],
        make_access: MakeAccess | None = None,
        after_commit: AfterCommit | None = None,
        one_at_a_time: bool = False,
    ) -> list[ShardRecord]:
        """Bring all shards to the disk. On any error the unfinished ones are removed, and the error goes on its way.

        Args:
            plan: what to do.
            done: file name -> record of the shards finished in an earlier run.
            make_access: access to shards that are not local.
            after_commit: see `AfterCommit`.
            one_at_a_time: begin no shard before the one before it is through with that.

        Returns:
            the records of all shards, in order.
        """
        for i, shard in enumerate(plan.shards):
            if shard.file_name in done:
                self._skip(i, len(plan.shards), shard, done[shard.file_name])
        records = dict(done)
        damaged: Counter[str] = Counter()
        while len(records) < len(plan.shards):
            order = ReadingOrder(plan, records)
            if make_access is not None:
                self.access.close()
                self.access = make_access(order, damaged.keys())
            with Committer(self._manifest, self._out, plan, records, self.access, self.emit, after_commit) as committer:
                try:
                    self._convert_all(plan, order, committer, one_at_a_time)
                except DamagedShardError as damage:
                    damaged[damage.shard.path.name] += 1
                    self._see_to_repeat(plan, records, damage, damaged[damage.shard.path.name])
        return [records[shard.file_name] for shard in plan.shards]

    def _see_to_repeat(
        self, plan: ConversionPlan, records: Mapping[str, ShardRecord], damage: DamagedShardError, n_times: int
    ) -> None:
        """Tell that what has no name yet is converted again; or that it will not help."""
        name = quoted(damage.shard.path.name)
        if n_times == _TRIES:
            raise CorruptFileError(
                f"{name} came {_TRIES} times with other bytes than the Hub lists: {damage}",
                "a proxy, a network or a disk on the way alters it; nothing of it was kept",
            )
        first = next(i for i, shard in enumerate(plan.shards) if shard.file_name not in records)
        self.emit(ShardRepeated(first, len(plan.shards), plan.shards[first].file_name, f"{name} came with wrong bytes"))

    def _convert_all(
        self,
        plan: ConversionPlan,
        order: ReadingOrder,
        committer: Committer,
        one_at_a_time: bool,
    ) -> None:
        """Convert what has no record, and wait until it has."""
        n = len(plan.shards)
        commits: list[Future[None]] = []
        try:
            for i in [i for i in range(n) if plan.shards[i].file_name not in committer.records]:
                self.emit(ShardStarted(i, n, plan.shards[i].file_name))
                try:
                    one = self._convert(plan.shards[i], order)
                except NonFiniteWeightError as error:
                    wait(commits)
                    committer.check_source_of(f"{error.module_name}.weight", i)  # wrong bytes look like anything
                    raise
                commits.append(committer.submit(i, one))
                if one_at_a_time or len(commits) > 1:
                    commits[-1 if one_at_a_time else -2].result()
            for commit in commits[-1:]:
                commit.result()
        except KeyboardInterrupt:
            committer.abandon()
            raise
        finally:
            wait(commits)  # until then the committer's thread owns the shards it was given

    def _skip(self, i: int, n: int, shard: PlannedShard, record: ShardRecord) -> None:
        self.emit(ShardSkipped(i, n, shard.file_name, shard.n_bytes))
        for event in replay_events(shard, record):
            self.emit(event)

    def _convert(self, shard: PlannedShard, order: ReadingOrder) -> ConvertedShard:
        """Convert one shard, up to but not including its final name."""
        one = ConvertedShard(ShardWriter(self._out / shard.file_name, shard.outputs))
        try:
            with ExitStack() as open_readers:
                blocks = ShardBlocks(shard, one, open_readers, self.access, order, self.emit)
                running = [self._workers.submit(blocks.work, scratch) for scratch in self._scratches]
                try:
                    for worker in running:
                        worker.result()
                except BaseException as error:
                    blocks.turns.close()
                    if isinstance(error, KeyboardInterrupt):
                        self.access.close()  # workers may wait for bytes that do not come
                    for worker in running:
                        worker.exception()
                    raise
        except BaseException:
            one.discard()
            raise
        return one
