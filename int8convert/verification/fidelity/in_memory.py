"""Reference and int8 model side by side, both in memory: every window through both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.events import FidelityStarted, FidelityStep
from int8convert.runtime.models import check_length
from int8convert.runtime.pretrained import model_errors
from int8convert.verification.fidelity.arithmetic import running
from int8convert.verification.fidelity.comparison import (
    Comparison,
    FidelityTask,
    Measured,
    check_vocabulary,
    decoder_layers,
    hidden_state,
)
from int8convert.verification.fidelity.memory import resident_bytes
from int8convert.verification.fidelity.stream_plan import bytes_in_memory


def compare_in_memory(task: FidelityTask) -> Measured:
    """Run all windows through both models."""
    windows = task.windows
    task.on_event(FidelityStarted(False, resident_bytes() + bytes_in_memory(task), len(windows.ids)))
    exact = task.load_reference()
    layers = decoder_layers(exact)
    check_length(exact, windows)
    int8 = task.load_int8()
    int8_layers = decoder_layers(int8)
    comparisons = task.start_comparisons(int8)
    for i, ids in enumerate(windows.ids):
        with _recording(layers) as states:
            exact_logits = _logits(exact, ids)
        scored = slice(windows.scored_from(i) - 1, -1)
        for comparison in comparisons:
            with running(int8, comparison.arithmetic, comparison.columns), _comparing(int8_layers, states, comparison):
                logits = _logits(int8, ids)
            check_vocabulary(logits, exact_logits)
            comparison.statistics.add(logits[scored], exact_logits[scored], ids[scored.start + 1 :])
        task.on_event(FidelityStep("window", i + 1, len(windows.ids)))
    return Measured(comparisons, int8.dtype, exact.dtype)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[positions, vocabulary]."""
    with model_errors(model):
        logits: torch.Tensor = model(ids[None].to(model.device), use_cache=False).logits[0]
    return logits


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """What decoder layers pass on while this lasts."""
    states: dict[str, torch.Tensor] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        states[name] = hidden_state(output).detach()

    with _hooked(layers, record):
        yield states


@contextmanager
def _comparing(
    layers: Mapping[str, nn.Module], states: Mapping[str, torch.Tensor], comparison: Comparison
) -> Iterator[None]:
    """Compare what decoder layers pass on with what was recorded, while this lasts."""

    def compare(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        comparison.add_layer(name, hidden_state(output), states[name])

    with _hooked(layers, compare):
        yield


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
