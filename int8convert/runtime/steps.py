"""Reports the steps of a measurement, each with an estimate of the time for the rest.

The estimate is the time of all steps so far, divided by their share of the work. It does not count the loading of
models before the first step. `warming_up` takes out what only the first tokens cost: compilation, and pages of files
that are read for the first time. On a tiny model that is ten times a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from int8convert.events import EventSink, MeasurementStep

N_WARM_UP = 8
"""Number of tokens that warm a model up; fewer if the windows are shorter."""


class Steps:
    """The steps of a measurement, from the time this is made."""

    def __init__(
        self, work: Sequence[float], on_event: EventSink, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start the clock.

        Args:
            work: the work of each step, in any unit.
            on_event: receives `MeasurementStep`.
        """
        self._work = work
        self._on_event = on_event
        self._clock = clock
        self._n_done = 0
        self._began = clock()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Leave out the time until the context ends."""
        began = self._clock()
        yield
        self._began += self._clock() - began

    def done(self, step: str) -> None:
        """Report the next step as done."""
        self._n_done += 1
        n, seconds = self._n_done, self._clock() - self._began
        remaining_s = seconds * sum(self._work[n:]) / sum(self._work[:n])
        self._on_event(MeasurementStep(step, n, len(self._work), remaining_s))
