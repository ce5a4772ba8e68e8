"""Finds the outlier features of a checkpoint by running a text through it once.

1. Windows from all over a text go through the model, int8 or not, layer by layer; see `calibration.run`.
2. Hooks gather sums for every input column, and a histogram for columns with outliers.
3. From these come the outlier columns of each layer, the outlier features of the model, and the columns worth storing.
4. On request the model runs three times more: as it is, without these features, and without random others.

Costs the memory of one decoder layer, and a few numbers for each input and output feature. Ablation and damage need the
whole model in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.calibration.run import RunOptions, Task, read_inputs, read_whole
from int8convert.calibration.windows import fit_windows, local_directory, read_windows_for
from int8convert.errors import SourceError
from int8convert.events import EventSink, ignore
from int8convert.formats.layers import features_of
from int8convert.outliers.ablation import AblationRun, ablate
from int8convert.outliers.choice import BUDGET, MIN_SHARE, choose_columns
from int8convert.outliers.damage import LayerDamage, estimate_damage
from int8convert.outliers.features import LayerInput, OutlierFeature, describe_inputs, find_features
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.models import choose_device, load_model
from int8convert.runtime.stored_columns import live_names
from int8convert.runtime.text.texts import Text
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class OutlierReport:
    """The outliers of a checkpoint on a text.

    Attributes:
        path: the checkpoint, as the caller named it.
        text, text_sha256: file name and hash of the text.
        n_sequences, length: number of windows, and tokens of each.
        threshold: magnitude from which a value is an outlier, in the units of the inputs.
        n_layers: blocks of the model with inputs that count for the paper's statistics.
        inputs: the inputs of the layers that are int8, or would be.
        features: the dimensions that meet the paper's criteria.
        ablation: effect of taking them away; empty if not asked for, or if there are none.
        damage: what rounding each layer costs the predictions; empty if not asked for. Layers that did not run on this
            text have none.
        min_share, budget: the rule for columns worth storing, see `int8convert.outliers.choice`.
        static_set: layer -> columns worth storing, ascending; layers without any are left out.
        static_set_bytes: bytes of these columns in 16 bits.
        int8_bytes: bytes of the layers' int8 weights.
        largest: layer -> the largest magnitude of each column of its input, float32 [in], for pictures.
    """

    path: str
    text: str
    text_sha256: str
    n_sequences: int
    length: int
    threshold: float
    n_layers: int
    inputs: tuple[LayerInput, ...]
    features: tuple[OutlierFeature, ...]
    ablation: tuple[AblationRun, ...]
    damage: tuple[LayerDamage, ...]
    min_share: float
    budget: float
    static_set: dict[str, tuple[int, ...]]
    static_set_bytes: int
    int8_bytes: int
    device: str
    elapsed_s: float
    largest: dict[str, torch.Tensor] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; infinity, which JSON cannot hold, becomes null."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "largest"}
        names = ("inputs", "features", "ablation", "damage")
        lists = {name: [asdict(entry) for entry in fields[name]] for name in names}
        for layer in lists["damage"]:
            del layer["columns"]
        result: dict[str, Any] = _finite({"schema": 1, **fields, **lists})
        return result

    def calibration(self) -> dict[str, Any]:
        """Return how the static set was chosen, for the file that holds it."""
        names = ("text", "text_sha256", "n_sequences", "length", "threshold", "min_share", "budget")
        return {**{name: getattr(self, name) for name in names}, "by_damage": bool(self.damage)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def find_outliers(
    path: str | os.PathLike[str],
    text: Text = Text(),  # noqa: B008, frozen
    *,
    threshold: float = OUTLIER_THRESHOLD,
    with_ablation: bool = False,
    with_damage: bool = False,
    min_share: float = MIN_SHARE,
    budget: float = BUDGET,
    module_names: Iterable[str] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_event: EventSink = ignore,
) -> OutlierReport:
    """Run a text through a checkpoint and report its outliers.

    Does not know what other texts would show. A few thousand tokens show the features that matter: these occur at
    nearly every position.

    Args:
        path: a checkpoint's directory, int8 or not.
        text: what the model reads; windows have 256 tokens by default, or what the model takes if that is less.
        threshold: magnitude from which a value is an outlier.
        with_ablation: also measure the effect of taking the features away.
        with_damage: also estimate what rounding each layer costs, and choose columns by that. The checkpoint must not
            be int8.
        min_share, budget: the rule for columns worth storing, see `int8convert.outliers.choice`.
        module_names: the modules to examine, as an int8 checkpoint's tensors name them; None for those that are int8 or
            would be.
        device: "auto", "cpu" or "cuda[:n]".
        trust_remote_code: run code in the checkpoint.
        on_event: receives `MeasurementStarted` and `MeasurementStep`.

    Raises:
        Int8ConvertError: checkpoint or text cannot be read, or the device is missing.
        ValueError: a number is out of its range.
    """
    began = time.perf_counter()
    if not threshold > 0 or not 0 <= min_share <= 1 or not budget >= 0:
        raise ValueError("threshold must be positive, min_share from 0 to 1, budget at least 0")
    used = choose_device(device)
    local = local_directory(path, on_event)
    windows = read_windows_for(local, text, trust_remote_code, os.fspath(path))

    def prepare(model: Any) -> Task:
        return Task(_layers(model, module_names), fit_windows(model, windows, may_cut=text.length is None))

    options = RunOptions(threshold, used, trust_remote_code, with_values=True, on_event=on_event)
    if with_ablation or with_damage:
        model = load_model(local, used, trust_remote_code=trust_remote_code)
        _check_whole(path, model, with_ablation, with_damage)
        readings = read_whole(model, prepare(model), options)
    else:
        readings = read_inputs(local, prepare, options)
    statistics, weights = readings.statistics, readings.weights
    layers, windows = readings.task.layers, readings.task.windows
    inputs = describe_inputs(statistics, readings.hidden_size)
    features = find_features(inputs, statistics)
    states = {entry.module_name: layers[entry.module_name] for entry in inputs if entry.is_hidden_state}
    damage = estimate_damage(model, layers, windows.ids, threshold) if with_damage else ()
    columns = choose_columns(
        weights, statistics, min_share=min_share, budget=budget, damage=_columns_of(damage) if with_damage else None
    )
    static_set = {name: tuple(found.tolist()) for name, found in columns.items() if found.numel()}
    return OutlierReport(
        path=os.fspath(path),
        text=windows.text,
        text_sha256=windows.text_sha256,
        n_sequences=len(windows.ids),
        length=windows.ids.shape[1],
        threshold=threshold,
        n_layers=len({entry.layer for entry in inputs if entry.is_hidden_state}),
        inputs=inputs,
        features=features,
        damage=damage,
        ablation=ablate(model, states, windows.ids, [f.column for f in features]) if with_ablation and features else (),
        min_share=min_share,
        budget=budget,
        static_set=static_set,
        static_set_bytes=sum(2 * weights[name].n_rows * len(found) for name, found in static_set.items()),
        int8_bytes=sum(weight.n_rows * len(weight.columns) for weight in weights.values()),
        device=used,
        elapsed_s=time.perf_counter() - began,
        largest={name: seen.largest for name, seen in statistics.items()},
    )


def _columns_of(damage: Iterable[LayerDamage]) -> dict[str, torch.Tensor]:
    return {layer.module_name: layer.columns for layer in damage if layer.columns is not None}


def _layers(model: Any, module_names: Iterable[str] | None) -> dict[str, nn.Module]:
    """Return the layers to examine, by the names that the caller uses."""
    if module_names is not None:
        live = {live: name for name, live in live_names(model, module_names).items()}
        found = {live[name]: module for name, module in model.named_modules() if name in live}
    else:
        int8 = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
        found = {name: model.get_submodule(name) for name in int8 or modules_to_replace(model)}
    layers = {name: module for name, module in found.items() if features_of(module) is not None}
    if not layers:
        raise SourceError(
            "the model has none of the layers that the int8 checkpoint holds",
            "give the checkpoint that was converted, or the int8 checkpoint itself",
        )
    return layers


def _check_whole(path: str | os.PathLike[str], model: Any, with_ablation: bool, with_damage: bool) -> None:
    """Check that a model can be ablated, and that its damage can be estimated."""
    if with_ablation:
        check_predicts(model, "ablation needs", "leave out --ablate")
    if with_damage:
        check_predicts(model, "the damage of rounding needs", "leave out --damage")
        _check_float(path, model)


def check_predicts(model: Any, what: str, hint: str) -> None:
    """Refuse a model that does not predict the next token; `what` begins the message."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise SourceError(f"{what} a model that predicts the next token, and {type(model).__name__} does not", hint)


def _check_float(path: str | os.PathLike[str], model: nn.Module) -> None:
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise SourceError(
            f"the damage of rounding is that of the weights before it, and {quoted(os.fspath(path), 200)} is int8",
            "give the source",
        )
