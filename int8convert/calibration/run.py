"""Runs a text through a checkpoint and gathers what its Linear layers read: layer by layer, or whole in memory.

1. One decoder layer is in memory at a time. All windows go through it, some of them together; their hidden states stay
   in memory, or in files if they are large. See `runtime.layered`.
2. Layers outside of the decoder layers are watched once: those before while the first decoder layer runs, those after
   in a run from the last hidden state.
3. A model that cannot be run this way is loaded whole.

Costs the reading of all weights once, the memory of one decoder layer, and a few numbers for each feature. On a Qwen2
of 0.5B, with 8 windows of 256 tokens and one thread, it took 0.8 of the CPU time of the whole model's forward on one
window after the other, and 1.35 with second moments; loading, hashing and writing included.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from int8convert.calibration.moments import InputRecorder, moments_bytes
from int8convert.calibration.statistics import InputStatistics, watching
from int8convert.calibration.weight_squares import WeightSquares, weight_squares
from int8convert.errors import LayerwiseError, SourceError
from int8convert.events import EventSink, MeasurementStarted, ignore
from int8convert.formats.layers import features_of
from int8convert.runtime.layered.hidden_states import HiddenStates
from int8convert.runtime.layered.layer_runner import LayerRunner
from int8convert.runtime.layered.layered_model import LayeredModel
from int8convert.runtime.layered.memory import CODE_BYTES, are_in_files, part_bytes, working_bytes
from int8convert.runtime.memory import float_bytes, resident_bytes
from int8convert.runtime.models import is_int8, load_model, settle_dtype
from int8convert.runtime.pretrained import model_errors
from int8convert.runtime.steps import N_WARM_UP, Steps
from int8convert.runtime.text.windows import TokenWindows

_TOKENS_AT_A_TIME = 2048


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a checkpoint is run.

    Attributes:
        threshold: magnitude from which a value is an outlier.
        device: "cpu" or "cuda[:n]".
        with_values: also make histograms of outlier values.
        moments: the calibration folder that gets second moments; None for none.
    """

    threshold: float
    device: str
    trust_remote_code: bool = False
    with_values: bool = False
    moments: Path | None = None
    on_event: EventSink = ignore


@dataclass(frozen=True, slots=True)
class Task:
    """The layers of a model to watch, and the windows to run.

    Attributes:
        layers: Linear layers by the names that the caller uses.
        n_held_out: windows, the last ones, that are not in second moments.
    """

    layers: Mapping[str, nn.Module]
    windows: TokenWindows
    n_held_out: int = 0

    def batches(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Yield token ids [windows, length] that run together, and whether they are held out."""
        ids = self.windows.ids
        n_together = max(1, _TOKENS_AT_A_TIME // ids.shape[1])
        n_used = len(ids) - self.n_held_out
        for part, is_held_out in ((ids[:n_used], False), (ids[n_used:], True)):
            if len(part):
                yield from ((batch, is_held_out) for batch in part.split(n_together))


@dataclass(frozen=True, slots=True)
class Readings:
    """What layers read.

    Attributes:
        statistics, weights: by the names of the task's layers, in their order.
        hidden_size: features of the model's hidden state.
        streamed: whether the model ran layer by layer.
    """

    task: Task
    statistics: dict[str, InputStatistics]
    weights: dict[str, WeightSquares]
    recorder: InputRecorder
    hidden_size: int
    streamed: bool


def read_inputs(path: str | os.PathLike[str], prepare: Callable[[Any], Task], options: RunOptions) -> Readings:
    """Run a checkpoint layer by layer, or as a whole if its model cannot be run that way.

    Args:
        path: the checkpoint's directory.
        prepare: chooses layers and windows for a model, whose weights may be on the meta device.

    Raises:
        Int8ConvertError: the checkpoint cannot be read or run; or second moments are wanted of a model that cannot be
            run layer by layer.
    """
    try:
        return _read_by_layers(path, prepare, options)
    except LayerwiseError as error:
        if options.moments is not None:
            raise SourceError(
                f"second moments need a run layer by layer: {error.message}", "leave out --moments"
            ) from error
    model = load_model(path, options.device, trust_remote_code=options.trust_remote_code)
    return read_whole(model, prepare(model), options)


def run_tokens(model: Any, ids: torch.Tensor) -> Any:
    """Run token ids [batch, tokens] through a model; a decoder that needs its own tokens gets the same."""
    ids = ids.to(next(model.parameters()).device)
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return model(ids, **({"decoder_input_ids": ids} if is_encoder_decoder else {}))


@torch.no_grad()
def read_whole(model: Any, task: Task, options: RunOptions) -> Readings:
    """Run a model in memory."""
    batches = list(task.batches())
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    recorder = InputRecorder(None)
    options.on_event(MeasurementStarted(False, resident_bytes() + n_bytes, len(batches)))
    steps = Steps([ids.numel() for ids, _ in batches], options.on_event)
    with _watching(task.layers, options, recorder) as statistics:
        for ids, _ in batches:
            with model_errors(model):
                run_tokens(model, ids)
            steps.done("window")
    recorder.finish()
    weights = {name: weight_squares(layer) for name, layer in task.layers.items()}
    return Readings(task, statistics, weights, recorder, _hidden_size(model), streamed=False)


def _hidden_size(model: Any) -> int:
    """Return the size of the hidden state; of a model whose config has none, of its embeddings."""
    text = model.config.get_text_config()
    return int(getattr(text, "hidden_size", 0) or model.get_input_embeddings().embedding_dim)


def _watching(
    layers: Mapping[str, nn.Module], options: RunOptions, recorder: InputRecorder
) -> AbstractContextManager[dict[str, InputStatistics]]:
    return watching(layers, options.threshold, with_values=options.with_values, on_input=recorder.add)


@torch.no_grad()
def _read_by_layers(path: str | os.PathLike[str], prepare: Callable[[Any], Task], options: RunOptions) -> Readings:
    load = partial(load_model, path, options.device, trust_remote_code=options.trust_remote_code)
    if is_int8(path):
        layered = LayeredModel(path, load)
    else:
        layered = LayeredModel(path, load, partial(settle_dtype, path=path, device=options.device))
    task = prepare(layered.model)
    run = _LayeredRun(layered, task, options)
    states_bytes = 4 * task.windows.ids.numel() * run.hidden_size
    in_files = are_in_files(states_bytes)
    peak = resident_bytes() + _bytes_by_layers(path, run, options) + (0 if in_files else states_bytes)
    options.on_event(MeasurementStarted(True, peak, len(layered.layers)))
    with _folder(in_files) as folder:
        statistics, weights = run.all_layers(HiddenStates(folder))
    order = task.layers
    return Readings(
        task,
        {name: statistics[name] for name in order},
        {name: weights[name] for name in order},
        run.recorder,
        run.hidden_size,
        streamed=True,
    )


@contextmanager
def _folder(is_wanted: bool) -> Iterator[Path | None]:
    if not is_wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="int8convert-") as path:
        yield Path(path)


def _bytes_by_layers(path: str | os.PathLike[str], run: _LayeredRun, options: RunOptions) -> int:
    """Return the memory of one decoder layer with its inputs, and of what is loaded before: embeddings and norms."""
    loaded = (lambda tensor: tensor.n_bytes) if is_int8(path) else partial(float_bytes, device=options.device)
    parts = part_bytes(path, loaded)
    length = run.task.windows.ids.shape[1]
    work = working_bytes(run.layered.model.config, max(1, _TOKENS_AT_A_TIME // length), length)
    widths = [[(features_of(m) or (0, 0))[0] for m in run.inside(i).values()] for i in range(len(run.layered.layers))]
    moments = max(map(moments_bytes, widths)) if options.moments is not None else 0
    return parts.layer + work + moments + CODE_BYTES


class _LayeredRun:
    """One run of a task through a layered model."""

    def __init__(self, layered: LayeredModel, task: Task, options: RunOptions) -> None:
        self.layered, self.task, self._options = layered, task, options
        self.recorder = InputRecorder(options.moments)
        self.hidden_size = _hidden_size(layered.model)
        self._runner = LayerRunner(layered)
        self._place = {id(module): i for i, layer in enumerate(layered.layers.values()) for module in layer.modules()}

    def inside(self, i: int | None) -> dict[str, nn.Module]:
        """Return the watched layers inside decoder layer i; for None, those outside of all decoder layers."""
        return {name: module for name, module in self.task.layers.items() if self._place.get(id(module)) == i}

    def all_layers(self, states: HiddenStates) -> tuple[dict[str, InputStatistics], dict[str, WeightSquares]]:
        """Run all windows through all decoder layers, then through what comes after them."""
        statistics: dict[str, InputStatistics] = {}
        weights: dict[str, WeightSquares] = {}
        layers = self.layered.layers
        work = [max(1, sum(parameter.numel() for parameter in layer.parameters())) for layer in layers.values()]
        steps = Steps(work, self._options.on_event)
        outside = self.inside(None)
        for i, name in enumerate(layers):
            inside = self.inside(i)
            with self.layered.holding(name):
                if i == 0:
                    with steps.warming_up():
                        self._runner.run(0, self.task.windows.ids[:1, :N_WARM_UP], None)
                statistics |= self._run(i, inside if i else inside | outside, states)
                weights |= {key: weight_squares(module) for key, module in inside.items()}
            self.recorder.finish()
            steps.done(name)
        after = {name: module for name, module in outside.items() if not statistics[name].n_tokens}
        with self.layered.holding(self.layered.head if after else None):
            if after:
                statistics |= self._run(len(layers), after, states)
                self.recorder.finish()
            weights |= {key: weight_squares(module) for key, module in outside.items()}
        return statistics, weights

    def _run(self, i: int, watched: Mapping[str, nn.Module], states: HiddenStates) -> dict[str, InputStatistics]:
        """Run all windows through decoder layer i, or through what comes after the last one."""
        is_layer = i < len(self.layered.layers)
        with _watching(watched, self._options, self.recorder) as found:
            for w, (ids, is_held_out) in enumerate(self.task.batches()):
                self.recorder.is_held_out = is_held_out
                if is_layer:
                    states[w] = self._runner.run(i, ids, states[w] if i else None)
                else:
                    self._runner.run_rest(ids, states[w])
        return found
