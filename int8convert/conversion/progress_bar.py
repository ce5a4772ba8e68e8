"""What a library user sees of a conversion by default: one tqdm bar over the bytes read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from int8convert.conversion.events import Event, EventSink, PlanMade, TensorKept, TensorQuantized


@contextmanager
def showing_bar() -> Iterator[EventSink]:
    """A sink for the events, whose bar is closed whatever happens."""
    from tqdm.auto import tqdm

    seen: set[str] = set()  # tensors of a shard that is repeated come again

    with tqdm(unit="B", unit_scale=True, desc="quantize") as bar:

        def on_event(event: Event) -> None:
            match event:
                case PlanMade(plan):  # a second one if modules turned out to hold what no int8 can
                    seen.clear()
                    bar.reset(total=plan.n_read_bytes)
                case TensorQuantized(tensor=tensor) | TensorKept(tensor=tensor) if tensor.output_name not in seen:
                    seen.add(tensor.output_name)
                    bar.update(tensor.source.n_bytes)

        yield on_event
