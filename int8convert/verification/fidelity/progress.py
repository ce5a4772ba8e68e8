"""How far a measurement of fidelity is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FidelityProgress:
    """One step is done.

    Attributes:
        streamed: layer by layer; else both models are in memory.
        peak_memory_bytes: that will be resident in this process at most, by plan.
        step: "start", before anything is loaded; "window"; or the name of the layer that was streamed.
        n_done, n_steps: of all steps.
    """

    streamed: bool
    peak_memory_bytes: int
    step: str
    n_done: int
    n_steps: int


ProgressHandler = Callable[[FidelityProgress], None]


@dataclass(slots=True)
class Steps:
    """Counts steps, and tells who wants to know."""

    handler: ProgressHandler | None
    streamed: bool
    peak_memory_bytes: int
    n_steps: int
    n_done: int = 0

    def start(self) -> None:
        self._tell("start")

    def finish(self, step: str) -> None:
        self.n_done += 1
        self._tell(step)

    def _tell(self, step: str) -> None:
        if self.handler is not None:
            self.handler(FidelityProgress(self.streamed, self.peak_memory_bytes, step, self.n_done, self.n_steps))
