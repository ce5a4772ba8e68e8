"""One conversion of a plan into its locked output directory: what is finished, what fits, shards, small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from int8convert.checkpoint.atomic import as_output_error
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.loaders.shard_index import build_index
from int8convert.checkpoint.manifest import ShardRecord
from int8convert.checkpoint.safetensors_file import METADATA_NAME
from int8convert.conversion.destination import Destination
from int8convert.conversion.device import Device
from int8convert.conversion.disk_budget import DiskBudget
from int8convert.conversion.output import OutputDirectory
from int8convert.conversion.pipeline import Pipeline
from int8convert.conversion.readers import ReaderChoice, Reading, access_maker, choose_reader, is_remote
from int8convert.conversion.records import plan_made
from int8convert.errors import DiskFullError, Int8ConvertError
from int8convert.events import EventSink
from int8convert.planning.export_plan import ShardedPlan
from int8convert.planning.plan import PlannedShard
from int8convert.planning.reading_order import ReadingOrder


class Conversion:
    """Writes a plan's shards and the small files into OUT, and resumes what an earlier run began.

    Args:
        check: trust shards of an earlier run only by their sha256, not by their size alone.
    """

    def __init__(self, output: OutputDirectory, destination: Destination, reading: Reading, check: bool) -> None:
        self._output = output
        self._destination = destination
        self._reading = reading
        self._check = check
        self._has_begun = False

    def run(
        self,
        plan: ShardedPlan,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
        n_workers: int,
        device: Device,
        emit: EventSink,
    ) -> None:
        """Convert the shards that are not finished, and complete the checkpoint.

        Raises:
            DiskFullError: it does not fit; nothing is written then.
        """
        done = self._find_finished(plan)
        budget = self._check_disk(plan, done)
        choice = self._choose_reader(plan, done, budget, n_workers)
        self._has_begun = True  # from here on, files may be removed, and a repository may be made
        self._destination.begin(self._output, done, len(plan.shards))
        with Pipeline(self._output.manifest, self._output.path, n_workers, emit, device) as pipeline:
            is_read = choice is not None and len(done) < len(plan.shards)
            pipeline.emit(plan_made(plan, device, choice if is_read else None))
            make_access = access_maker(choice, self._reading, self._output.incoming, n_workers, pipeline.emit)
            deliver = self._destination.deliver
            records = pipeline.run(plan, done, make_access, deliver, budget.one_at_a_time)
        index = None
        if len(plan.shards) > 1:
            n_bytes = sum(tensor.output_bytes for tensor in plan.tensors)
            weight_map = {n: shard.file_name for shard in plan.shards for n in shard.outputs if n != METADATA_NAME}
            index = build_index(weight_map, n_bytes, plan.n_parameters)
        self._output.complete(plan.source, config, index, summary, records)
        self._destination.complete(self._output)

    def _find_finished(self, plan: ShardedPlan) -> dict[str, ShardRecord]:
        records = {} if self._output.replaces else self._output.manifest.read_records()
        done = {s.file_name: records[s.file_name] for s in plan.shards if self._is_done(s, records)}
        return self._destination.find_finished(plan, done, self._output)

    def _is_done(self, shard: PlannedShard, records: Mapping[str, ShardRecord]) -> bool:
        """Return whether an earlier run finished a shard by the same plan, and its file is as it was left."""
        record = records.get(shard.file_name)
        path = self._output.path / shard.file_name
        if record is None or not path.is_file() or path.stat().st_size != record.n_bytes:
            return False
        if record.plan_sha256 != shard.digest():
            return False
        return not self._check or file_sha256(path) == record.sha256

    def _check_disk(self, plan: ShardedPlan, done: Mapping[str, ShardRecord]) -> DiskBudget:
        n_free_bytes = self._output.free_bytes()
        budget = self._destination.budget(plan, done, n_free_bytes)
        if budget.n_spare_bytes < 0:
            raise DiskFullError(
                f"OUT '{self._output.path}' needs {budget.n_bytes:,} bytes, its disk has {n_free_bytes:,} free",
                "make room, or name a directory on another disk, and rerun the same command",
            )
        return budget

    def _choose_reader(
        self, plan: ShardedPlan, done: Mapping[str, ShardRecord], budget: DiskBudget, n_workers: int
    ) -> ReaderChoice | None:
        """Return how the shards that are left come from the Hub; None for a local source."""
        if not is_remote(plan.source):
            return None
        asked, cache_dir, n_spare_bytes = self._reading.reader, self._reading.cache_dir, budget.n_spare_bytes
        choice = choose_reader(asked, ReadingOrder(plan, done), n_workers, cache_dir, n_spare_bytes)
        if cache_dir is None and choice.costs.disk_bytes > n_spare_bytes:
            raise DiskFullError(
                f"a download needs {choice.costs.disk_bytes:,} bytes beside the output, but {n_spare_bytes:,} are free",
                "pass --reader stream, which needs none",
            )
        return choice

    @contextmanager
    def stating_progress(self) -> Iterator[None]:
        """Set `state` of the error that stops the conversion to how far it got. An OSError in the body is OUT's."""
        try:
            yield
        except OSError as error:
            raise self._with_state(as_output_error(error, self._output.path)) from error
        except Int8ConvertError as error:
            raise self._with_state(error) from error.__cause__

    def _with_state(self, error: Int8ConvertError) -> Int8ConvertError:
        if self._has_begun:
            kept = [name for name in self._output.manifest.read_records() if (self._output.path / name).is_file()]
            state = self._destination.progress(kept, self._output.path)
            error.state = state or "what this run had written was removed"
        return error
