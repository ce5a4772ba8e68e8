"""A conversion's events as a live bar where a person watches, as one line a shard elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from int8convert.cli.console import (
    format_bytes,
    format_percent,
    format_shards,
    note,
    stderr,
    wants_live_display,
)
from int8convert.conversion.events import (
    Event,
    EventSink,
    PlanMade,
    ShardFinished,
    ShardSkipped,
    ShardStarted,
    SourceFetched,
    TensorKept,
    TensorQuantized,
)
from int8convert.conversion.report import notes_of
from int8convert.planning.plan import ConversionPlan

_WIDE, _MEDIUM = 100, 80
"""Columns of a terminal that has room for all numbers, and for all but what is fetched."""


class _Counter:
    """What both displays count: bytes read and written by this run, bytes of shards that were done, seconds."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self.written_bytes = 0
        self.done_bytes = 0
        self._seen: set[str] = set()
        self._fetched: dict[str, int] = {}
        self._began = time.perf_counter()

    def add(self, event: Event) -> None:
        # Tensors of a shard that is made again come again, and those of one that is done though nothing was read.
        if isinstance(event, ShardSkipped):
            new = [tensor for tensor in event.shard.tensors if tensor.output_name not in self._seen]
            self.done_bytes += sum(tensor.source.n_bytes for tensor in new)
            self._seen.update(tensor.output_name for tensor in new)
        if isinstance(event, TensorQuantized | TensorKept) and event.tensor.output_name not in self._seen:
            self._seen.add(event.tensor.output_name)
            self.read_bytes += event.tensor.source.n_bytes
            self.written_bytes += event.tensor.output_bytes

    def fetch(self, file_name: str, n_bytes: int) -> None:
        """So many bytes of a file have come."""
        self._fetched[file_name] = n_bytes

    @property
    def passed_bytes(self) -> int:
        return self.done_bytes + self.read_bytes

    def detail(self, width: int) -> str:
        """What fits beside a bar on a terminal so many columns wide."""
        fetched = f"{format_bytes(sum(self._fetched.values()))} fetched, " if self._fetched else ""
        written = f", {format_bytes(self.written_bytes)} written"
        return f"{fetched if width >= _WIDE else ''}{self.rate} in{written if width >= _MEDIUM else ''}"

    @property
    def rate(self) -> str:
        return f"{format_bytes(self.read_bytes / max(1e-9, time.perf_counter() - self._began))}/s"


@contextmanager
def showing_progress(quiet: bool, as_json: bool, check: bool) -> Iterator[EventSink]:
    """The sink to hand to `quantize`.

    Args:
        check: whether finished shards are compared with their sha256.
    """
    done = f"is done from an earlier run{', sha256 checked' if check else ''}"
    if as_json:
        yield lambda _event: None
    elif quiet:
        yield _print_notes
    elif wants_live_display(quiet, as_json):
        with _live_progress(done) as sink:
            yield sink
    else:
        yield _plain_progress(done)


def _print_notes(event: Event) -> None:
    for text in notes_of(event):
        note(text)


def _announce(plan: ConversionPlan) -> None:
    stderr.print(
        f"{plan.model_map.model_class or 'unknown class'}: {format_bytes(plan.n_read_bytes)} in "
        f"{format_shards(len(plan.source.shards))} -> {format_bytes(plan.n_written_bytes)} in {len(plan.shards)}, "
        f"{format_percent(plan.coverage)} of the parameters to int8"
    )


def _plain_progress(done: str) -> EventSink:
    counter = _Counter()

    def on_event(event: Event) -> None:
        counter.add(event)
        _print_notes(event)
        match event:
            case PlanMade(plan):
                _announce(plan)
            case ShardSkipped(i=i, n=n, shard=shard):
                stderr.print(f"shard {i + 1} of {n}: {shard.file_name} {done}")
            case ShardFinished(i=i, n=n, shard=shard):
                written = f"{format_bytes(shard.n_bytes)} written, {counter.rate} read"
                stderr.print(f"shard {i + 1} of {n}: {shard.file_name} {written}")

    return on_event


@contextmanager
def _live_progress(done: str) -> Iterator[EventSink]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=stderr,
        transient=True,
        expand=True,
    )
    counter = _Counter()
    task = progress.add_task("reading the model class", total=None, detail="")

    def on_event(event: Event) -> None:
        counter.add(event)
        _print_notes(event)
        match event:
            case PlanMade(plan):
                _announce(plan)
                progress.reset(task, total=plan.n_read_bytes)
            case ShardSkipped(i=i, n=n, shard=shard):
                stderr.print(f"shard {i + 1} of {n}: {shard.file_name} {done}")
                progress.update(task, completed=counter.passed_bytes)
            case SourceFetched(shard=source, n_bytes=n_bytes):
                counter.fetch(source.path.name, n_bytes)
                progress.update(task, detail=counter.detail(stderr.width))
            case ShardStarted(i=i, n=n):
                progress.update(task, description=f"shard {i + 1} of {n}")
            case TensorQuantized() | TensorKept():
                progress.update(task, completed=counter.passed_bytes, detail=counter.detail(stderr.width))

    with progress:
        yield on_event
