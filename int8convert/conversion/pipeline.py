"""Converts shards one after the other, in as many threads as there are cores: read, hash, convert, write.

1. A shard's tensors are cut into row blocks, in the order of the file's bytes.
2. Each worker thread takes the next block, reads it, converts it, hashes what it made, and hands it to the threads that
   write (`checkpoint/direct_file`). If the source has a sha256 to compare with, the block is added to it when its turn
   comes. While one thread waits for the source, the disk or its turn, another computes: kernels, hashing and system
   calls hold no Python lock.
3. A thread of its own (`commit`) puts the finished shard on the disk, names and records it, while the next one is
   converted. At most two shards are unfinished, so at most two are to be redone; more only where one source shard,
   which is checked at its end, makes many.

Memory: two buffers of a megabyte a thread, the chunks on their way to the disk, and the scales of the tensors in work.
It does not depend on the model's size, but for calibrated rounding, which needs the square of a layer's inputs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from pathlib import Path

from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.shard_access import DamagedShardError, ShardAccess
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.conversion.calibrated_rows import CalibrationInputs
from int8convert.conversion.commit import Committer, ConvertedShard, Deliver
from int8convert.conversion.device import CPU, Device, make_scratch
from int8convert.conversion.records import replay_events
from int8convert.conversion.shard_blocks import ShardBlocks
from int8convert.errors import CorruptFileError, NonFiniteWeightError
from int8convert.events import Event, EventSink, ShardRepeated, ShardSkipped, ShardStarted
from int8convert.planning.export_plan import ShardedPlan
from int8convert.planning.plan import PlannedShard
from int8convert.planning.reading_order import MakeAccess, ReadingOrder
from int8convert.text import quoted

_TRIES = 3
"""Number of arrivals of a source shard with wrong bytes at which the conversion fails."""


class Pipeline:
    """Converts planned shards into a directory. A context manager, for its threads."""

    def __init__(self, manifest: Manifest, out: Path, n_workers: int, emit: EventSink, device: Device = CPU) -> None:
        self.device = device
        self.n_workers = n_workers
        self._manifest = manifest
        self._out = out
        self._sink = emit
        self._emit_lock = threading.Lock()
        self._scratches = [make_scratch(device) for _ in range(n_workers)]
        self._inputs = CalibrationInputs()
        self._workers = ThreadPoolExecutor(n_workers, "worker")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown()

    def emit(self, event: Event) -> None:
        """Pass an event to the sink. Any thread may call it."""
        with self._emit_lock:
            self._sink(event)

    def run(
        self,
        plan: ShardedPlan,
        done: Mapping[str, ShardRecord],
        make_access: MakeAccess,
        deliver: Deliver,
        one_at_a_time: bool = False,
    ) -> list[ShardRecord]:
        """Bring all shards to the disk and to their destination; return all records, in order.

        On any error the unfinished shards are removed.

        Args:
            done: file name -> record of the shards that are finished already.
            one_at_a_time: begin a shard only after the one before it is delivered.
        """
        for i, shard in enumerate(plan.shards):
            if shard.file_name in done:
                self.emit(ShardSkipped(i, len(plan.shards), shard.file_name, shard.n_bytes))
                for event in replay_events(shard, done[shard.file_name]):
                    self.emit(event)
        records = dict(done)
        damaged: Counter[str] = Counter()
        while len(records) < len(plan.shards):
            order = ReadingOrder(plan, records)
            with (
                closing(make_access(order, damaged.keys())) as access,
                Committer(self._manifest, self._out, plan, records, access, self.emit, deliver) as committer,
            ):
                try:
                    self._convert_all(plan, order, access, committer, one_at_a_time)
                except DamagedShardError as damage:
                    damaged[damage.shard.path.name] += 1
                    self._announce_repeat(plan, committer.records, damage, damaged[damage.shard.path.name])
            records = committer.records
        return [records[shard.file_name] for shard in plan.shards]

    def _announce_repeat(
        self, plan: ShardedPlan, records: Mapping[str, ShardRecord], damage: DamagedShardError, n_times: int
    ) -> None:
        """Announce that unfinished shards are converted again, unless the source came too often with wrong bytes."""
        name = quoted(damage.shard.path.name)
        if n_times == _TRIES:
            raise CorruptFileError(
                f"{name} came {_TRIES} times with other bytes than the Hub lists: {damage}",
                "check the proxy, the network and the disk on the way: one of them alters it",
            )
        first = next(i for i, shard in enumerate(plan.shards) if shard.file_name not in records)
        self.emit(ShardRepeated(first, len(plan.shards), plan.shards[first].file_name, f"{name} came with wrong bytes"))

    def _convert_all(
        self,
        plan: ShardedPlan,
        order: ReadingOrder,
        access: ShardAccess,
        committer: Committer,
        one_at_a_time: bool,
    ) -> None:
        """Convert the shards that have no record, and wait until they have one."""
        n = len(plan.shards)
        commits: list[Future[None]] = []
        try:
            for i in [i for i in range(n) if plan.shards[i].file_name not in committer.records]:
                self.emit(ShardStarted(i, n, plan.shards[i].file_name))
                try:
                    one = self._convert(plan.shards[i], order, access)
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

    def _convert(self, shard: PlannedShard, order: ReadingOrder, access: ShardAccess) -> ConvertedShard:
        """Convert one shard, up to but not including its final name."""
        one = ConvertedShard(ShardWriter(self._out / shard.file_name, shard.outputs))
        try:
            with ExitStack() as open_readers:
                blocks = ShardBlocks(shard, one, open_readers, access, order, self.emit, self._inputs)
                running = [self._workers.submit(blocks.work, scratch) for scratch in self._scratches]
                try:
                    for worker in running:
                        worker.result()
                except BaseException as error:
                    blocks.turns.close()
                    if isinstance(error, KeyboardInterrupt):
                        access.close()  # workers may wait for bytes that do not come
                    for worker in running:
                        worker.exception()
                    raise
        except BaseException:
            one.discard()
            raise
        return one
