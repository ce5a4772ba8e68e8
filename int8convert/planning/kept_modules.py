"""The rule by which a conversion keeps modules in 16 bits within a budget, and the choice that an earlier run made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from int8convert.events import EventSink, ModulesKept
from int8convert.planning.pending_plan import PlanRequest


@dataclass(frozen=True, slots=True)
class KeepBudget:
    """Keeps the modules whose rounding costs most, within a budget. `outliers.keep.keep_budget` makes one.

    Attributes:
        percent: the most weights to keep, in percent of those that would become int8.
        text_sha256: hash of the text that the costs are measured on.
        choose: takes a request and a sink of events, and returns the modules to keep.
    """

    percent: float
    text_sha256: str
    choose: Callable[[PlanRequest, EventSink], ModulesKept] = field(repr=False)

    def recorded(self) -> dict[str, Any]:
        """Return the entries of the recorded options."""
        return {"keep_budget": float(self.percent), "keep_text": self.text_sha256}


def with_earlier_choice(there: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request that also skips the modules that an earlier run chose; the same request if none did.

    Args:
        there: the request that the output records; None if there is none.
        wanted: the request of this run, whose `skip` holds what the user skips.
    """
    options = wanted["options"]
    earlier = (there or {}).get("options")
    skip = earlier.get("skip") if isinstance(earlier, dict) else None
    chosen = [str(name) for name in skip[len(options["skip"]) :]] if isinstance(skip, list) else []
    return {**wanted, "options": {**options, "skip": [*options["skip"], *chosen]}}
