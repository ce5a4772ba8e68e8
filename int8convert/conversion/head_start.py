"""Converting by a guess while transformers is still at work on the model map, which takes it seconds to begin.

The guess is the plan the name rules make. Shards are converted by it under their temporary names; when the true map
arrives, a shard is kept if the true plan would have written the same bytes, and dropped if not. The true map decides
everything: a wrong guess costs time, never bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from int8convert.conversion.commit import ConvertedShard
from int8convert.conversion.pipeline import Pipeline, ShardAbandonedError
from int8convert.decoding.fp8_scales import as_loaded
from int8convert.errors import Int8ConvertError
from int8convert.events import Event, ShardStarted, TensorKept, TensorQuantized
from int8convert.planning.name_rules import map_by_name
from int8convert.planning.pending_plan import PlanRequest
from int8convert.planning.plan import ConversionPlan, PlannedShard, make_plan
from int8convert.planning.reading_order import ReadingOrder


def guess_plan(request: PlanRequest) -> ConversionPlan | None:
    """The name rules' plan; None where they have none, for a reason the true map will state better."""
    try:
        guess = map_by_name(as_loaded(request.source), request.modules, None, "guess")
        return make_plan(request.source, guess, request.max_shard_bytes)
    except Int8ConvertError:
        return None


class HeadStart:
    """Shards converted by a guess.

    Args:
        pipeline: does the work.
        guess: the plan to follow.
        true_plan: the plan once it is known, None before; asked before each block.
        is_done: whether a shard is finished from an earlier run.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        guess: ConversionPlan,
        true_plan: Callable[[], ConversionPlan | None],
        is_done: Callable[[PlannedShard], bool],
    ) -> None:
        self._pipeline = pipeline
        self._guess = guess
        self._true_plan = true_plan
        self._is_done = is_done
        self._converted: dict[int, tuple[ConvertedShard, list[Event]]] = {}
        self._agreement: dict[int, bool] = {}

    def run(self) -> None:
        """Convert shards until the true plan is known; the one in work then is finished if it is right."""
        order = ReadingOrder(self._guess)
        for i, shard in enumerate(self._guess.shards):
            if self._true_plan() is not None:
                return
            if self._is_done(shard):
                continue
            events: list[Event] = []
            still_wanted = partial(self._is_wanted, i)
            try:
                self._converted[i] = (self._pipeline.convert(shard, events.append, order, still_wanted), events)
            except (ShardAbandonedError, Int8ConvertError):
                return  # an error that is real comes again by the true plan

    def _is_wanted(self, i: int) -> bool:
        plan = self._true_plan()
        return plan is None or self._agrees(plan, i)

    def _agrees(self, plan: ConversionPlan, i: int) -> bool:
        """Compared once a shard: this is asked before each block."""
        if i not in self._agreement:
            same = i < len(plan.shards) and plan.shards[i].digest() == self._guess.shards[i].digest()
            self._agreement[i] = same
        return self._agreement[i]

    def confirm(self, plan: ConversionPlan) -> dict[int, ConvertedShard]:
        """The shards the plan agrees with, their events told as if they had come by it; the others are removed."""
        confirmed = {}
        for i, (one, events) in self._converted.items():
            if not self._agrees(plan, i):
                one.discard()
                continue
            confirmed[i] = one
            reasons = {tensor.output_name: tensor.reason for tensor in plan.shards[i].tensors}
            self._pipeline.emit(ShardStarted(i, len(plan.shards), plan.shards[i].file_name))
            for event in events:
                if isinstance(event, TensorKept):
                    event = replace(event, reason=reasons[event.name])
                if isinstance(event, TensorQuantized | TensorKept):
                    one.write_down(event)
                    self._pipeline.emit(event)
        self._converted.clear()
        return confirmed

    def discard(self) -> None:
        """Remove all; harmless after `confirm`."""
        for one, _ in self._converted.values():
            one.discard()
        self._converted.clear()
