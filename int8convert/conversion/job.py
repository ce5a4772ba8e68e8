"""One conversion, inside its locked output directory: plan, checks, shards, small files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from int8convert import __version__
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.manifest import ARITHMETIC_VERSION, ShardRecord, describe_source
from int8convert.checkpoint.model_card import read_source_card
from int8convert.conversion.commit import AfterCommit
from int8convert.conversion.destination import Publishing, plan_disk
from int8convert.conversion.device import Device
from int8convert.conversion.output import OutputDirectory, as_output_error
from int8convert.conversion.pipeline import Pipeline
from int8convert.conversion.readers import Reader, access_maker, choose_reader, is_remote
from int8convert.conversion.records import plan_made
from int8convert.errors import DiskFullError, Int8ConvertError, OutputError
from int8convert.events import Event, EventSink, SourceFetched
from int8convert.planning.needs import made_up
from int8convert.planning.pending_plan import PlanRequest, PlanRequirements, plan_conversion
from int8convert.planning.plan import ConversionPlan, PlannedShard
from int8convert.planning.reading_order import MakeAccess, ReadingOrder

_TOLD_EVERY_BYTES = 4 << 20
"""Of what is fetched: pieces come by the ten thousand a second."""


def conversion_request(request: PlanRequest, options: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common to be parts of one conversion."""
    return {
        "arithmetic": ARITHMETIC_VERSION,
        "format": request.modules.output_format,
        "source": describe_source(request.source),
        "options": dict(options),
    }


@dataclass(frozen=True, slots=True)
class Reading:
    """How the shards of a repository on the Hub are had; of no concern to a local source.

    cache_dir: where what is downloaded stays; None removes it after use.
    """

    reader: Reader = Reader.AUTO
    cache_dir: Path | None = None


class Conversion:
    """What is converted into where, and how far it may go.

    Attributes:
        kept_modules: modules left 16-bit because their weights have no int8 form; grows as they are found.
    """

    def __init__(
        self,
        request: PlanRequest,
        output: OutputDirectory,
        requirements: PlanRequirements,
        check: bool,
        reading: Reading,
        publishing: Publishing | None,
    ) -> None:
        self._reading = reading
        self._publishing = publishing
        self._published: dict[str, ShardRecord] = {}
        self._one_at_a_time = False
        self._request = request
        self._source = request.source
        self._output = output
        self._requirements = requirements
        self._check = check
        self.kept_modules: tuple[str, ...] = ()

    def run(self, n_workers: int, device: Device, threshold: float, emit: EventSink) -> ConversionPlan:
        """Convert what is not converted yet and complete the directory; the plan that was followed."""
        with (
            self._telling_what_is_on_disk(),
            Pipeline(self._output.manifest, self._output.path, n_workers, emit, device) as pipeline,
        ):
            plan = plan_conversion(replace(self._request, kept_modules=self.kept_modules))
            done, make_access = self._check_and_begin(plan, pipeline)
            records = pipeline.run(plan, done, make_access, self._after_commit(), self._one_at_a_time)
            self._output.complete(plan, threshold, _summary(plan), records)
            if self._publishing is not None:
                self._publishing.publisher.complete(self._output.path)
                if not self._publishing.keeps:
                    self._output.discard()
            return plan

    def _check_and_begin(
        self, plan: ConversionPlan, pipeline: Pipeline
    ) -> tuple[dict[str, ShardRecord], MakeAccess | None]:
        """Check the plan and make the first write.

        Returns:
            The records of the shards that earlier runs finished, and access to source shards that are not files.
        """
        self._requirements.check(plan)
        records = {} if self._output.replaces else self._output.manifest.read_records()
        done = {s.file_name: records[s.file_name] for s in plan.shards if self._is_done(s, records)}
        if self._publishing is not None:
            done = self._add_published(plan, done)
        spare_bytes = self._check_disk(plan, done)
        if not is_remote(self._source):
            self._begin(plan, done)
            pipeline.emit(plan_made(plan, pipeline.device))
            return done, None
        order, cache_dir, n_workers = ReadingOrder(plan, done), self._reading.cache_dir, pipeline.n_workers
        choice = choose_reader(self._reading.reader, order, n_workers, cache_dir, spare_bytes)
        if cache_dir is None and choice.costs.disk_bytes > spare_bytes:
            raise DiskFullError(
                f"a download needs {choice.costs.disk_bytes:,} bytes beside the output, free are {spare_bytes:,}",
                "--reader stream needs none; or make room, and rerun the same command",
            )
        self._begin(plan, done)
        pipeline.emit(plan_made(plan, pipeline.device, choice if order.shards else None))

        sizes = {shard.path.name: shard.n_bytes for shard in order.shards}
        told = -_TOLD_EVERY_BYTES

        def on_event(event: Event) -> None:
            nonlocal told
            assert isinstance(event, SourceFetched)
            if not 0 <= event.n_bytes - told < _TOLD_EVERY_BYTES or event.n_bytes == sizes.get(event.file_name):
                told = event.n_bytes
                pipeline.emit(event)

        return done, access_maker(choice, self._output.incoming, cache_dir, n_workers, on_event)

    def _begin(self, plan: ConversionPlan, done: Mapping[str, ShardRecord]) -> None:
        """All is checked: the first write."""
        if self._publishing is not None:
            self._publishing.publisher.make()
        self._output.begin(done, len(plan.shards))
        if self._publishing is not None and not self._publishing.keeps:
            for name in self._published:  # killed before it could be removed, or kept by an earlier run
                (self._output.path / name).unlink(missing_ok=True)
        after_commit = self._after_commit()
        for name, record in done.items():
            if after_commit is not None and name not in self._published:
                after_commit(record, self._output.path / name)  # finished, and killed on its way

    def _check_disk(self, plan: ConversionPlan, done: Mapping[str, ShardRecord]) -> int:
        """See that what lies on the disk at a time fits; what is left beside it."""
        if self._publishing is None or self._publishing.keeps:
            self._output.check_room(plan)
            return self._output.spare_bytes(plan)
        free_bytes = self._output.free_bytes()
        budget = plan_disk(plan, done, is_remote(self._source), free_bytes, self._publishing)
        self._one_at_a_time = budget.one_at_a_time
        return min(free_bytes, self._publishing.max_disk_bytes or free_bytes) - budget.n_bytes

    def _add_published(self, plan: ConversionPlan, done: dict[str, ShardRecord]) -> dict[str, ShardRecord]:
        """With the shards that are where they go already."""
        assert self._publishing is not None
        if self._output.is_complete and not self._publishing.keeps and len(done) == len(plan.shards):
            raise OutputError(
                f"OUT '{self._output.path}' is a finished checkpoint, which would be removed once it is sent",
                "pass --keep, or send it by int8convert upload",
            )
        there = self._publishing.publisher.begin(self._output.request, self._output.overwrites)
        for shard in plan.shards:
            record = there.get(shard.file_name)
            if record is None or record.plan_sha256 != shard.digest():
                continue
            if shard.file_name in done or not self._publishing.keeps:
                self._published[shard.file_name] = done[shard.file_name] = record
        return done

    def _after_commit(self) -> AfterCommit | None:
        if self._publishing is None:
            return None
        publishing = self._publishing

        def publish(record: ShardRecord, path: Path) -> None:
            publishing.publisher.publish(record, path)
            self._published[record.file_name] = record
            if not publishing.keeps:
                path.unlink()

        return publish

    def _is_done(self, shard: PlannedShard, records: Mapping[str, ShardRecord]) -> bool:
        """Whether an earlier run finished a shard by the same plan, and its file is as it was left."""
        record = records.get(shard.file_name)
        path = self._output.path / shard.file_name
        if record is None or not path.is_file() or path.stat().st_size != record.n_bytes:
            return False
        if record.plan_sha256 != shard.digest():
            return False
        return not self._check or file_sha256(path) == record.sha256

    @contextmanager
    def _telling_what_is_on_disk(self) -> Iterator[None]:
        """Adds to the hint of whatever stops the conversion how far it got; OSErrors here are the output's."""
        try:
            yield
        except OSError as error:
            raise self._located(as_output_error(error, self._output.path)) from error
        except Int8ConvertError as error:
            raise self._located(error) from error.__cause__

    def _located(self, error: Int8ConvertError) -> Int8ConvertError:
        if self._output.has_begun:
            error.state = self._progress()
        return error

    def _progress(self) -> str:
        """How far it got, as a phrase."""
        n_there = len(self._published)
        here = [name for name in self._output.manifest.read_records() if (self._output.path / name).is_file()]
        n_here = len(here) if self._publishing is None else len({*here} - {*self._published})
        there = f"{_finished(n_there)} on the Hub" if n_there else ""
        kept = f"{_finished(n_here)} {f'in {self._output.path}' if self._publishing else 'kept'}" if n_here else ""
        if not there and not kept:
            return "what this run had written was removed"
        it = "it" if n_there + n_here == 1 else "them"
        return f"{' and '.join(filter(None, (there, kept)))}: the same command resumes behind {it}"


def _finished(n: int) -> str:
    return "1 finished shard is" if n == 1 else f"{n} finished shards are"


def _summary(plan: ConversionPlan) -> dict[str, Any]:
    """What the manifest says of the whole."""
    return {
        "tool": f"int8convert {__version__}",
        "source_card": read_source_card(plan.source.directory),
        "model_class": plan.model_map.model_class,
        "notes": list(plan.model_map.notes),
        "n_parameters": plan.n_parameters,
        "n_int8_parameters": plan.n_int8_parameters,
        "dropped": plan.dropped,
        "missing": made_up(plan.model_map),
        "skip_modules": list(plan.model_map.skip_modules),
    }
