"""The progress bar that a library user sees by default: one of tqdm, in bytes or in steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.events import (
    DamageStarted,
    Event,
    EventSink,
    FileSent,
    MeasurementStarted,
    MeasurementStep,
    PlanMade,
    SmoothingStarted,
    TensorKept,
    TensorQuantized,
    TensorsCompared,
)


@contextmanager
def sink_or_bar(on_event: EventSink | None, command: str) -> Iterator[EventSink]:
    """Yield the sink that was passed; for None, one that drives a bar, which is closed at the end."""
    if on_event is not None:
        yield on_event
        return
    from tqdm.auto import tqdm

    seen: set[str] = set()  # the tensors of a repeated shard are reported twice

    with tqdm(unit="B", unit_scale=True, desc=command) as bar:

        def move_to(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def show(event: Event) -> None:
            match event:
                case PlanMade(n_read_bytes=n_bytes):
                    bar.unit, bar.unit_scale = "B", True
                    seen.clear()
                    bar.reset(total=n_bytes)
                case TensorQuantized() | TensorKept() if event.name not in seen:
                    seen.add(event.name)
                    bar.update(event.n_read_bytes)
                case TensorsCompared(done, total) | FileSent(n_done_bytes=done, n_total_bytes=total):
                    move_to(done, total)
                case (
                    MeasurementStarted(n_steps=n_steps)
                    | DamageStarted(n_steps=n_steps)
                    | SmoothingStarted(n_steps=n_steps)
                ):
                    bar.unit, bar.unit_scale = " steps", False
                    bar.reset(total=n_steps)
                case MeasurementStep(n_done=done, n_steps=total):
                    move_to(done, total)

        yield show
