"""Shows the events of any command: a live bar where a person watches, one line a step elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from int8convert.cli.console import note, stderr, wants_live_display
from int8convert.conversion.report import notes_of
from int8convert.events import (
    DamageStarted,
    DownloadStarted,
    Event,
    EventSink,
    FileSent,
    HubReadStarted,
    MeasurementStarted,
    MeasurementStep,
    PlanMade,
    ShardFinished,
    ShardSkipped,
    ShardStarted,
    SmoothingStarted,
    SourceFetched,
    TensorKept,
    TensorQuantized,
    TensorsCompared,
    ignore,
)
from int8convert.text import counted, format_bytes, format_percent, format_rest

SKIPPED = "is done from an earlier run"
_WIDE, _MEDIUM = 100, 80
"""Columns of a terminal that has room for all numbers, and for all but the bytes fetched."""


@contextmanager
def showing_progress(quiet: bool, as_json: bool, waiting: str = "", skipped: str = SKIPPED) -> Iterator[EventSink]:
    """Yield the sink to pass as `on_event`.

    Args:
        quiet: print only notes.
        as_json: print nothing.
        waiting: what the live bar says before the first event; with "" the bar appears with the first event it shows.
        skipped: what is said of a finished shard that is found.
    """
    if as_json:
        yield ignore
    elif quiet:
        yield _print_notes
    elif wants_live_display(quiet, as_json):
        with _LiveBar(waiting) as bar:
            yield _Renderer(skipped, bar)
    else:
        yield _Renderer(skipped)


def _print_notes(event: Event) -> None:
    for text in notes_of(event):
        note(text)


class _Renderer:
    """Prints notes and lines, and passes events to the bar if there is one."""

    def __init__(self, skipped: str, bar: _LiveBar | None = None) -> None:
        self._skipped = skipped
        self._bar = bar
        self._counter = _Counter()
        self._tenths = 0
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:  # a publisher sends its events from a thread of its own
            self._counter.add(event)
            for text in (*notes_of(event), *_start_notes(event)):
                note(text)
            line = self._line(event)
            if line:
                stderr.print(line)
            if self._bar is not None:
                self._bar.show(event, self._counter)

    def _line(self, event: Event) -> str:
        """Return the line that reports an event; "" if it has none."""
        match event:
            case PlanMade(coverage=coverage):
                sizes = (
                    f"{format_bytes(event.n_read_bytes)} in {counted(event.n_source_shards, 'shard')} -> "
                    f"{format_bytes(event.n_written_bytes)} in {event.n_shards}"
                )
                if coverage is None:
                    return sizes
                share = f"{format_percent(coverage)} of the parameters to int8"
                return f"{event.model_class or 'unknown class'}: {sizes}, {share}"
            case ShardSkipped(i, n, file_name):
                return f"shard {i + 1} of {n}: {file_name} {self._skipped}"
            case ShardFinished(i, n, file_name, n_bytes) if self._bar is None or not self._bar.is_shown:
                rate = f", {self._counter.rate} read" if self._counter.read_bytes else ""
                return f"shard {i + 1} of {n}: {file_name} {format_bytes(n_bytes)} written{rate}"
            case FileSent(is_sent=True, n_total_bytes=total):
                so_far = f"; {format_bytes(event.n_done_bytes)} of {format_bytes(total)} are there" if total else ""
                return f"{event.name}: {format_bytes(event.n_bytes)} sent{so_far}"
            case MeasurementStep(_, n_done, n_steps) if self._bar is None and (
                n_done == 1 or 10 * n_done // n_steps > self._tenths
            ):
                self._tenths = 10 * n_done // n_steps
                rest = f", {format_rest(event.remaining_s)}" if n_done < n_steps else ""
                return f"measured: {n_done:,} of {n_steps:,} steps{rest}"
            case _:
                return ""


def _start_notes(event: Event) -> Iterator[str]:
    """Yield what is said of a long step before it starts."""
    match event:
        case HubReadStarted(repository, commit, n_bytes, is_kept):
            what = f"{repository} at {commit[:12]}"
            if n_bytes == 0:
                yield f"reading {what} from the cache of the Hub's client"
            elif is_kept:
                yield f"fetching {what} into the cache of the Hub's client: {format_bytes(n_bytes)}"
            else:
                yield f"reading {what} from the Hub: {format_bytes(n_bytes)}, of which nothing is kept"
        case DownloadStarted(file_name, n_bytes):
            yield f"fetching {file_name}, {format_bytes(n_bytes)}"
        case MeasurementStarted(streamed, peak_memory_bytes):
            how = "layer by layer" if streamed else "in memory"
            yield f"running {how}, at most {format_bytes(peak_memory_bytes)}"
        case DamageStarted(peak_memory_bytes):
            yield f"measuring the source's model in memory, about {format_bytes(peak_memory_bytes)}"
        case SmoothingStarted(n_steps):
            yield f"choosing the factors of {counted(n_steps, 'group')} of layers"


class _Counter:
    """Counts the bytes of a conversion: read and written by this run, done by an earlier one, fetched; and seconds."""

    def __init__(self) -> None:
        self.read_bytes = 0
        self._written_bytes = 0
        self._done_bytes = 0
        self._seen: set[str] = set()
        self._fetched: dict[str, int] = {}
        self._began = time.perf_counter()

    def add(self, event: Event) -> None:
        if isinstance(event, SourceFetched):
            self._fetched[event.file_name] = event.n_bytes
        if not isinstance(event, TensorQuantized | TensorKept) or event.name in self._seen:
            return  # the tensors of a shard that is made again are reported again
        self._seen.add(event.name)
        if event.is_replayed:
            self._done_bytes += event.n_read_bytes
        else:
            self.read_bytes += event.n_read_bytes
            self._written_bytes += event.n_written_bytes

    @property
    def passed_bytes(self) -> int:
        return self._done_bytes + self.read_bytes

    def detail(self, width: int) -> str:
        """Return what fits beside a bar on a terminal of so many columns."""
        fetched = f"{format_bytes(sum(self._fetched.values()))} fetched, " if self._fetched else ""
        written = f", {format_bytes(self._written_bytes)} written"
        return f"{fetched if width >= _WIDE else ''}{self.rate} in{written if width >= _MEDIUM else ''}"

    @property
    def rate(self) -> str:
        return f"{format_bytes(self.read_bytes / max(1e-9, time.perf_counter() - self._began))}/s"


class _LiveBar:
    """A bar that is redrawn in place and removed at the end. A context manager."""

    def __init__(self, waiting: str) -> None:
        self.is_shown = False
        self._waiting = waiting
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=stderr,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task(waiting, total=None, detail="")

    def __enter__(self) -> _LiveBar:
        if self._waiting:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _start(self) -> None:
        self.is_shown = True
        self._progress.start()

    def _update(self, **fields: Any) -> None:
        if not self.is_shown:
            self._start()
        self._progress.update(self._task, **fields)

    def _begin(self, total: int, description: str) -> None:
        self._progress.reset(self._task, total=total)
        self._update(description=description, detail="")

    def show(self, event: Event, counter: _Counter) -> None:
        match event:
            case PlanMade(n_read_bytes=n_bytes):
                self._begin(n_bytes, self._waiting)
            case SourceFetched():
                self._update(detail=counter.detail(stderr.width))
            case ShardStarted(i, n):
                self._update(description=f"shard {i + 1} of {n}")
            case TensorQuantized() | TensorKept():
                self._update(completed=counter.passed_bytes, detail=counter.detail(stderr.width))
            case TensorsCompared(done, total):
                self._update(description="comparing tensors", completed=done, total=total)
            case MeasurementStarted(n_steps=n_steps):
                self._begin(n_steps, "running both models")
            case DamageStarted(n_steps=n_steps):
                self._begin(n_steps, "measuring what rounding costs")
            case SmoothingStarted(n_steps=n_steps):
                self._begin(n_steps, "choosing factors")
            case MeasurementStep(step, done, total):
                # The bar's own estimate needs two steps.
                rest = f", {format_rest(event.remaining_s)}" if done == 1 < total else ""
                self._update(completed=done, total=total, detail=f"{step}{rest}")
