"""Runs every window through reference and int8 model, both in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.events import MeasurementStarted
from int8convert.runtime.layered.decoder_layers import decoder_layers, hidden_state
from int8convert.runtime.memory import resident_bytes
from int8convert.runtime.models import check_length
from int8convert.runtime.pretrained import model_errors
from int8convert.runtime.steps import N_WARM_UP, Steps
from int8convert.verification.fidelity.arithmetic import running
from int8convert.verification.fidelity.comparison import (
    Comparison,
    FidelityTask,
    Measured,
    check_vocabulary,
)
from int8convert.verification.fidelity.memory import bytes_in_memory


def compare_in_memory(task: FidelityTask) -> Measured:
    """Run all windows through both models."""
    windows = task.windows
    task.on_event(MeasurementStarted(False, resident_bytes() + bytes_in_memory(task), len(windows.ids)))
    exact = task.load_reference()
    layers = decoder_layers(exact)
    check_length(exact, windows)
    int8 = task.load_int8()
    int8_layers = decoder_layers(int8)
    comparisons = task.start_comparisons(int8)

    def run(ids: torch.Tensor, scored: slice, comparisons: Sequence[Comparison]) -> None:
        states: dict[str, torch.Tensor] = {}
        with _passing_states(layers, states.__setitem__):
            exact_logits = _logits(exact, ids)
        for comparison in comparisons:
            with (
                running(int8, comparison.arithmetic, comparison.columns),
                _passing_states(int8_layers, partial(_compare, comparison, states)),
            ):
                logits = _logits(int8, ids)
            check_vocabulary(logits, exact_logits)
            comparison.statistics.add(logits[scored], exact_logits[scored], ids[scored.start + 1 :])

    steps = Steps([1] * len(windows.ids), task.on_event)
    with steps.warming_up():
        run(windows.ids[0, :N_WARM_UP], slice(0, -1), [Comparison(each.arithmetic) for each in comparisons])
    for i, ids in enumerate(windows.ids):
        run(ids, slice(windows.scored_from(i) - 1, -1), comparisons)
        steps.done("window")
    return Measured(comparisons, int8.dtype, exact.dtype)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[positions, vocabulary]."""
    with model_errors(model):
        logits: torch.Tensor = model(ids[None].to(model.device), use_cache=False).logits[0]
    return logits


def _compare(comparison: Comparison, reference: Mapping[str, torch.Tensor], name: str, state: torch.Tensor) -> None:
    comparison.add_layer(name, state, reference[name])


@contextmanager
def _passing_states(layers: Mapping[str, nn.Module], receive: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Pass name and hidden state to a function whenever a decoder layer has run, until the context ends."""

    def after(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        receive(name, hidden_state(output).detach())

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(after, name)).remove)
        yield
