"""Runs reference and int8 model layer by layer, for models that do not fit in memory.

1. The parts of each model outside of the decoder layers are loaded; see `runtime.layered`.
2. For each decoder layer, the reference's weights are loaded, all windows go through, and the weights are released.
   Then the int8 model does the same, once for each of its arithmetics, and the hidden states are compared.
3. At the end the output heads are loaded, and give the logits of each window, some positions at a time.

Costs memory for one decoder layer of one of the models, for embeddings and heads of both, and for the hidden states of
all windows, which go into files if they are large. Takes time for tokens times layers, and for reading both checkpoints
once.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from int8convert.events import MeasurementStarted
from int8convert.runtime.layered.hidden_states import HiddenStates
from int8convert.runtime.layered.layer_runner import LayerRunner
from int8convert.runtime.layered.layered_model import LayeredModel
from int8convert.runtime.models import check_length
from int8convert.runtime.steps import N_WARM_UP, Steps
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.fidelity.arithmetic import ColumnCount, running
from int8convert.verification.fidelity.comparison import (
    Comparison,
    FidelityTask,
    Measured,
    check_vocabulary,
)
from int8convert.verification.fidelity.memory import plan_stream


def compare_in_lockstep(task: FidelityTask) -> Measured:
    """Run all windows through both models, layer by layer.

    Raises:
        SourceError: the model cannot be run layer by layer.
        CorruptFileError: weights are missing, or do not fit.
        DiskFullError: there is no room for the files of hidden states.
    """
    plan = plan_stream(task)
    task.on_event(MeasurementStarted(True, plan.peak_bytes, plan.n_layers + 1))
    exact = LayeredModel(task.reference, task.load_reference, task.settle_reference)
    check_length(exact.model, task.windows)
    int8 = LayeredModel(task.out, task.load_int8)
    comparisons = task.start_comparisons(int8.model)
    # A head of a large vocabulary takes as long as many layers.
    heads = [head] if (head := exact.model.get_output_embeddings()) is not None else list(exact.layers.values())[:1]
    steps = Steps([_n_parameters(part) for part in (*exact.layers.values(), *heads)], task.on_event)
    folder = tempfile.TemporaryDirectory(prefix="int8convert-") if plan.states_in_files else nullcontext()
    with folder as path:
        lockstep = _Lockstep(exact, int8, task.windows, comparisons, Path(path) if path else None)
        for i, name in enumerate(exact.layers):
            lockstep.run_layer(i, name, steps)
            steps.done(name)
        lockstep.run_heads()
        steps.done("head")
    return Measured(comparisons, int8.model.dtype, exact.model.dtype)


def _n_parameters(part: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in part.parameters()))


class _Lockstep:
    """Both models, and the hidden states of all windows."""

    def __init__(
        self,
        exact: LayeredModel,
        int8: LayeredModel,
        windows: TokenWindows,
        comparisons: tuple[Comparison, ...],
        folder: Path | None,
    ) -> None:
        self._exact, self._int8 = exact, int8
        self._exact_runner, self._int8_runner = LayerRunner(exact), LayerRunner(int8)
        self._windows = windows
        self._exact_states = HiddenStates(folder)
        self._int8_states = [(comparison, HiddenStates(folder)) for comparison in comparisons]

    def run_layer(self, i: int, name: str, steps: Steps) -> None:
        """Run all windows through one layer of both models; warm up before the first one."""
        first = self._windows.ids[0, :N_WARM_UP]
        with self._exact.holding(name):
            if i == 0:
                with steps.warming_up():
                    self._exact_runner.run(i, first, None)
            for w, ids in enumerate(self._windows.ids):
                self._exact_states[w] = self._exact_runner.run(i, ids, self._exact_states[w] if i else None)
        with self._int8.holding(name):
            for comparison, states in self._int8_states:
                if i == 0:
                    with steps.warming_up(), running(self._int8.layers[name], comparison.arithmetic, ColumnCount()):
                        self._int8_runner.run(i, first, None)
                with running(self._int8.layers[name], comparison.arithmetic, comparison.columns):
                    for w, ids in enumerate(self._windows.ids):
                        states[w] = self._int8_runner.run(i, ids, states[w] if i else None)
                        comparison.add_layer(name, states[w], self._exact_states[w])

    def run_heads(self) -> None:
        """Compute the logits from the last hidden states, and count them."""
        with self._exact.holding(self._exact.head), self._int8.holding(self._int8.head):
            for comparison, states in self._int8_states:
                with running(self._int8.model, comparison.arithmetic, comparison.columns):
                    for w in range(len(self._windows.ids)):
                        self._count(comparison, w, states[w])

    def _count(self, comparison: Comparison, w: int, state: torch.Tensor) -> None:
        ids = self._windows.ids[w]
        blocks = zip(
            self._exact_runner.logits(ids, self._exact_states[w]), self._int8_runner.logits(ids, state), strict=True
        )
        first, begin = self._windows.scored_from(w) - 1, 0
        continues = False
        for exact, int8 in blocks:
            check_vocabulary(int8, exact)
            scored = slice(max(first - begin, 0), min(len(exact), len(ids) - 1 - begin))
            targets = ids[1:][begin : begin + len(exact)][scored]
            begin += len(exact)
            if len(targets):
                comparison.statistics.add(int8[scored], exact[scored], targets, continues=continues)
                continues = True
