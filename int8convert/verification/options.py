"""Options of `verify` in groups: how far it goes, how the models run, which tasks they answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """What `verify` measures, from cheap to dear. Each level includes those before it."""

    EXACT = "exact"
    FIDELITY = "fidelity"
    TASKS = "tasks"


@dataclass(frozen=True, slots=True)
class Execution:
    """How the two models run.

    Attributes:
        device: "auto", "cpu" or "cuda[:n]".
        stream: run layer by layer, with one layer of each model in memory; None streams only models that do not fit.
        modes: arithmetics of the int8 model, see `fidelity.arithmetic`; none for the one that `load` would run.
        thresholds: outlier thresholds to run each mode at, in the units of the inputs; none for the checkpoint's own.
    """

    device: str = "auto"
    stream: bool | None = None
    modes: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Tasks:
    """Zero-shot tasks of the lm-evaluation-harness.

    Attributes:
        names: tasks or groups of them; none for `tasks.DEFAULT_TASKS`, or for all tasks of `path`.
        path: a folder of tasks in the harness's form, which replaces the harness's own.
        limit: questions of each task; None for all.
    """

    names: tuple[str, ...] = ()
    path: str | os.PathLike[str] | None = None
    limit: int | None = None
