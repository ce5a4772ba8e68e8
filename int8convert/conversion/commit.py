"""Gives converted shards their names: in order, and only after every byte they were made of is checked.

One thread finishes source shards after their last tensor was read, puts output shards on the disk, names and records
them, while the next shard is converted. An output shard keeps its temporary name until the checksums of its sources are
known. If one is wrong, the shard is discarded and converted again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from int8convert.checkpoint.manifest import Manifest, ShardRecord, TensorRecord
from int8convert.checkpoint.shard_access import DamagedShardError, ShardAccess
from int8convert.checkpoint.shard_writer import ShardWriter
from int8convert.checkpoint.source import SourceShard, reading
from int8convert.conversion.records import tensor_record
from int8convert.decoding.scale import is_as_fetched
from int8convert.events import EventSink, ShardFinished, TensorKept, TensorQuantized
from int8convert.planning.export_plan import ShardedPlan

Deliver = Callable[[ShardRecord, Path, Callable[[], None]], None]
"""Brings a shard that has its name and its record to its destination; see `destination`."""


class AbandonedError(Exception):
    """The conversion was interrupted while a shard was delivered. Does not leave the committer's thread."""


class ConvertedShard:
    """A shard that is written under a temporary name, and the records of its tensors."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self.tensors: dict[str, TensorRecord] = {}

    def record(self, event: TensorQuantized | TensorKept) -> None:
        name, record = tensor_record(event)
        self.tensors[name] = record

    def discard(self) -> None:
        """Remove the file. Harmless after it got its name."""
        self.writer.discard()


class Committer:
    """Names, records and delivers converted shards. A context manager, for its thread.

    Args:
        done: file name -> record of the shards that are finished already.
        access: gives the checksums of the source's shards.

    Attributes:
        records: file name -> record of all finished shards.
    """

    def __init__(
        self,
        manifest: Manifest,
        out: Path,
        plan: ShardedPlan,
        done: Mapping[str, ShardRecord],
        access: ShardAccess,
        emit: EventSink,
        deliver: Deliver,
    ) -> None:
        self._manifest = manifest
        self._out = out
        self._plan = plan
        self._access = access
        self._emit = emit
        self._deliver = deliver
        self._thread = ThreadPoolExecutor(1, "committer")
        self._waiting: deque[tuple[int, ConvertedShard]] = deque()
        self._sha256: dict[str, str | None] = {}
        self._is_abandoned = False
        self.records = dict(done)
        # A source shard is recorded with the last output shard made of it, whichever run converts that. It is finished
        # after the last output shard that this run makes of it.
        self._last_use: dict[str, int] = {}
        self._last_need: dict[str, int] = {}
        self._sources: list[dict[str, SourceShard]] = []
        self._source_of: dict[str, SourceShard] = {}
        for i, shard in enumerate(plan.shards):
            sources = {source.path.name: source for tensor in shard.tensors for source in tensor.shards}
            self._sources.append(sources)
            self._source_of |= sources
            self._last_use.update((name, i) for name in sources)
            if shard.file_name not in done:
                self._last_need.update((name, i) for name in sources)
        self._wait_for_scales()

    def _wait_for_scales(self) -> None:
        """Finish shards on the Hub that are needed only for scales after all others."""
        todo = [i for i, shard in enumerate(self._plan.shards) if shard.file_name not in self.records]
        pending = (tensor for i in todo for tensor in self._plan.shards[i].tensors)
        converted = {tensor.shard.path.name for tensor in pending if not tensor.is_beside_codes}
        for name in self._last_need.keys() - converted:
            if self._access.is_checked(self._source_of[name]):
                self._last_need[name] = todo[-1]

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for waiting in self._waiting:
            waiting[1].discard()

    def abandon(self) -> None:
        """Stop before the next step, and do not wait for a delivery."""
        self._is_abandoned = True

    def submit(self, i: int, one: ConvertedShard) -> Future[None]:
        """Take over shard i. The future resolves when every shard that may be committed now is committed."""
        return self._thread.submit(self._work, i, one)

    def check_source_of(self, output_name: str, i: int) -> None:
        """Read the source shard of a tensor of shard i to its end, if it has a checksum.

        Raises:
            DamagedShardError: its bytes are wrong.
        """
        for tensor in self._plan.shards[i].tensors:
            is_open = tensor.shard.path.name not in self._sha256 and self._access.is_checked(tensor.shard)
            if tensor.output_name == output_name and is_open:
                self._finish(tensor.shard)
            ahead = tensor.read_ahead if tensor.output_name == output_name else ()
            if (damaged := next((found for found in ahead if not is_as_fetched(found)), None)) is not None:
                raise DamagedShardError(damaged.shard, "its scales differed when they were read again")

    def _work(self, i: int, one: ConvertedShard) -> None:
        self._waiting.append((i, one))
        try:
            self._go_on()
            for name in sorted(name for name, last in self._last_need.items() if last == i):
                source = self._source_of[name]
                if self._access.is_checked(source) or self._last_use[name] == i:
                    self._finish(source)
        except BaseException:
            one.discard()
            raise
        while self._waiting and self._may_have_its_name(self._waiting[0][0]):
            self._commit(*self._waiting.popleft())
        for _, waiting in self._waiting:
            waiting.writer.finish()

    def _finish(self, source: SourceShard) -> None:
        with reading(source.path.name):
            self._sha256[source.path.name] = self._access.finish(source)

    def _may_have_its_name(self, i: int) -> bool:
        return all(
            name in self._sha256 or not self._access.is_checked(source) for name, source in self._sources[i].items()
        )

    def _commit(self, i: int, one: ConvertedShard) -> None:
        shard = self._plan.shards[i]
        try:
            sha256 = one.writer.commit()
        finally:
            one.discard()
        used = {name: self._sha256[name] for name in sorted(self._sources[i]) if self._last_use[name] == i}
        read = {name: sha256 for name, sha256 in used.items() if sha256 is not None}
        tensors = dict(sorted(one.tensors.items()))
        record = ShardRecord(shard.file_name, one.writer.n_bytes, sha256, shard.digest(), read, tensors)
        self._manifest.add(record)
        self._deliver(record, self._out / shard.file_name, self._go_on)
        self.records[shard.file_name] = record
        self._emit(ShardFinished(i, len(self._plan.shards), shard.file_name, shard.n_bytes))

    def _go_on(self) -> None:
        if self._is_abandoned:
            raise AbandonedError
