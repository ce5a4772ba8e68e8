"""Chooses modules that stay 16-bit within a budget, by what their rounding costs the predictions.

The source's model is loaded in floating point, a text goes through it once, forward and backward (`damage`), and the
modules with most damage for their weights are chosen, with those that read the same tensor.

Costs the model in memory, and the activations of one window. Does not know what other texts would choose.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.calibration.windows import fit_windows, read_windows_for
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import AdapterError, DeviceError
from int8convert.events import DamageStarted, EventSink, ModulesKept
from int8convert.formats.format import Format
from int8convert.formats.layers import features_of
from int8convert.hub.cached_copy import fetch_checkpoint, reading_cached
from int8convert.outliers.damage import LayerDamage, backward_bytes, estimate_damage
from int8convert.outliers.find import check_predicts
from int8convert.outliers.folded_model import fold_model
from int8convert.planning.kept_modules import KeepBudget
from int8convert.planning.pending_plan import PlanRequest, plan_conversion
from int8convert.planning.plan import ConversionPlan
from int8convert.runtime.memory import USABLE, available_bytes, float_bytes, resident_bytes
from int8convert.runtime.models import choose_device, load_model, read_config
from int8convert.runtime.steps import Steps
from int8convert.runtime.stored_columns import live_names
from int8convert.runtime.text.texts import Text, open_text
from int8convert.runtime.text.windows import TokenWindows, read_text
from int8convert.text import format_bytes

OPTION = "--keep-budget"
_HINT = f"leave out {OPTION}"

LOADERS_INPUTS = {
    Format.BITSANDBYTES: "inputs_by_rule",
    Format.TORCHAO: "inputs_by_token",
    Format.COMPRESSED_TENSORS: "inputs_by_token",
}
"""Format -> how its loaders round inputs, one of `damage.INPUTS`."""


def keep_budget(percent: float, text: Text, *, device: str = "auto", trust_remote_code: bool = False) -> KeepBudget:
    """Return the rule that `quantize` keeps modules by.

    Args:
        percent: the most weights to keep in 16 bits, in percent of those that would become int8; above 0.
        text: what the model reads; windows have 256 tokens by default, or what the model takes if that is less.
        device: where the model runs: "auto", "cpu" or "cuda[:n]".
        trust_remote_code: run code in the source, as `quantize` does.

    Raises:
        SourceError: the text cannot be read.
        ValueError: the budget is out of its range.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"the budget must be above 0 and at most 100 percent, not {percent}")
    with open_text(text) as file:
        _, digest = read_text(file.path)
    used = choose_device(device)

    def choose(request: PlanRequest, on_event: EventSink) -> ModulesKept:
        return measure(request, text, used, trust_remote_code, on_event).kept(percent / 100)

    return KeepBudget(percent, digest, choose)


@dataclass(frozen=True, slots=True)
class Measured:
    """What rounding the int8 weights of a plan costs.

    Attributes:
        sizes: module name in the model -> bytes of its weight in 16 bits.
        n_weights: number of weights that would become int8, those of modules that did not run included.
        inputs: how the format's loader rounds inputs, one of `damage.INPUTS`.
    """

    damage: tuple[LayerDamage, ...]
    sizes: Mapping[str, int]
    n_weights: int
    inputs: str

    @property
    def kl(self) -> float:
        """The expected KL divergence in nats a token, in the arithmetic of the format's loader."""
        return sum(layer.cost(self.inputs) for layer in self.damage)

    def kept(self, share: float) -> ModulesKept:
        """Choose the modules to keep in 16 bits.

        Args:
            share: the most weights to keep, 0 to 1.
        """
        kept = choose_kept(self.damage, share * self.n_weights, self.inputs)
        return ModulesKept(
            names=tuple(layer.module_name for layer in kept),
            n_weights=sum(layer.n_weights for layer in kept),
            n_bytes=sum(self.sizes[layer.module_name] - layer.n_weights for layer in kept),
            kl_before=self.kl,
            kl_after=self.kl - sum(layer.cost(self.inputs) for layer in kept),
            n_unmeasured=self.n_weights - sum(layer.n_weights for layer in self.damage),
        )


def measure(request: PlanRequest, text: Text, device: str, trust_remote_code: bool, on_event: EventSink) -> Measured:
    """Measure what a conversion would round, on a text; a source on the Hub is fetched first.

    Args:
        device: "cpu" or "cuda[:n]".

    Raises:
        Int8ConvertError: the source cannot be planned or run, does not fit in memory, or gets an adapter.
    """
    if request.adapter is not None:
        raise AdapterError(
            f"{OPTION} measures the source, which without the adapter is another model", f"leave out {OPTION} or --lora"
        )
    if request.source.commit is not None:
        fetch_checkpoint(request.source, on_event)
        request = replace(request, source=reading_cached(request.source))
    planned = plan_conversion(request)
    sizes = _int8_weights(planned)
    source = planned.source
    damage = estimate_in_memory(
        source,
        tuple(sizes),
        read_windows_for(source.directory, text, trust_remote_code, source.label),
        device,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
        hint="run int8convert outliers SRC --text FILE --damage where it fits, and pass the --skip options it prints",
        planned=planned,
    )
    n_weights = sum(tensor.n_elements for tensor in planned.tensors if tensor.is_quantized)
    return Measured(damage, sizes, n_weights, LOADERS_INPUTS[request.modules.output_format])


def choose_kept(damage: Sequence[LayerDamage], budget: float, inputs: str | None) -> tuple[LayerDamage, ...]:
    """Choose the layers whose weights in 16 bits take away most damage for their bytes.

    Args:
        budget: the largest number of weights that stay. Layers of a group stay together.
        inputs: the arithmetic of the inputs, as in `LayerDamage.of_inputs`.
    """
    groups: dict[int, list[LayerDamage]] = {}
    for layer in damage:
        groups.setdefault(layer.group, []).append(layer)

    def worth(group: list[LayerDamage]) -> float:
        return sum(layer.cost(inputs) for layer in group) / sum(layer.n_weights for layer in group)

    kept: list[LayerDamage] = []
    for group in sorted(groups.values(), key=worth, reverse=True):
        n_weights = sum(layer.n_weights for layer in group)
        if n_weights <= budget:
            kept += group
            budget -= n_weights
    return tuple(kept)


def _int8_weights(planned: ConversionPlan) -> dict[str, int]:
    """Return module name in the model -> bytes of its weight as a copy, of modules that would become int8.

    Experts that are one tensor in the model are left out.
    """
    quantized = {tensor.source.name: tensor.n_elements for tensor in planned.tensors if tensor.is_quantized}
    n_bytes = torch.finfo(getattr(torch, planned.model_map.dtype)).bits // 8
    return {
        parameter.removesuffix(".weight"): n_bytes * quantized[source_name]
        for parameter, (source_name, _) in planned.model_map.parameters.items()
        if source_name in quantized
    }


def estimate_in_memory(
    source: CheckpointSource,
    module_names: Iterable[str],
    windows: TokenWindows,
    device: str,
    *,
    trust_remote_code: bool,
    on_event: EventSink,
    hint: str,
    threshold: float = OUTLIER_THRESHOLD,
    dtype: torch.dtype | None = None,
    planned: ConversionPlan | None = None,
) -> tuple[LayerDamage, ...]:
    """Load a source, and estimate the damage of those modules that run on a text, by their names in the model.

    Args:
        source: a checkpoint whose weights are on this machine.
        module_names: as in the model, or as in a checkpoint's tensors.
        windows: longer ones than the model takes are cut.
        hint: the hint where the model does not fit.
        threshold, dtype: see `estimate_damage`.
        planned: a plan whose rotation and smoothing are folded into the model first; None folds nothing.

    Raises:
        DeviceError: the model does not fit in memory.
        SourceError: it does not predict the next token, or has no gradient.
    """
    gc.collect()  # models that ran before may stand in cycles
    needed = sum(float_bytes(tensor, device) for tensor in source.tensors)
    needed += backward_bytes(read_config(source.directory, trust_remote_code), windows.ids.shape[1])
    there = available_bytes(device)
    if needed > USABLE * there:
        raise DeviceError(
            f"measuring what rounding costs takes the source's model in memory, {format_bytes(needed)}, and "
            f"{format_bytes(there)} are free",
            hint,
        )
    on_event(DamageStarted(needed + (resident_bytes() if device == "cpu" else 0), len(windows.ids)))
    model = load_model(source.directory, device, trust_remote_code=trust_remote_code)
    check_predicts(model, "the damage of rounding needs", _HINT)
    if planned is not None:
        fold_model(model, planned)
    windows = fit_windows(model, windows, may_cut=True)
    layers = {name: model.get_submodule(name) for name in live_names(model, module_names).values()}
    layers = {name: layer for name, layer in layers.items() if features_of(layer) is not None}
    return estimate_damage(model, layers, _reporting(windows, on_event), threshold, dtype=dtype, hint=_HINT)


def _reporting(windows: TokenWindows, on_event: EventSink) -> Iterator[torch.Tensor]:
    """Yield each window, and report it when the next one is asked for."""
    steps = Steps([1] * len(windows.ids), on_event)
    for ids in windows.ids:
        yield ids
        steps.done("window")
