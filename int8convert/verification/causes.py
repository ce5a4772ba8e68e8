"""Estimates why predictions of an int8 checkpoint differ from its source's, and finds a conversion that is nearer.

What the rounding of each layer costs is estimated on the source, by `outliers.damage`: of the layer's weights, and of
its inputs in the arithmetic that ran. The same estimate for the rounding of the source's weights to their own dtype
gives a scale for a divergence.

A conversion that keeps the costliest modules in 16 bits is expected to lower what was measured by their share of the
estimate. Of `BUDGETS`, the smallest is chosen that is expected to meet the gates.

Costs the source in memory once more, and the activations of one window. Does not know stored columns: it takes the
columns that LLM.int8() finds in their place. In arithmetics with blocks it knows no outlier columns, and estimates too
much.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.checkpoint.names import SMOOTHING_FILE
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES
from int8convert.events import EventSink
from int8convert.formats.format import DEFAULT_FORMAT, Format
from int8convert.formats.int8_checkpoint import open_int8_checkpoint
from int8convert.outliers.damage import LayerDamage
from int8convert.outliers.keep import choose_kept, estimate_in_memory
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.planning.pending_plan import PlanRequest, plan_conversion
from int8convert.planning.plan import ConversionPlan
from int8convert.planning.recorded_request import read_recorded_request
from int8convert.planning.smoothing import open_factors
from int8convert.publish.verify_command import Gates
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.fidelity.arithmetic import WEIGHT_ONLY
from int8convert.verification.fidelity.level import FidelityReport

BUDGETS = (0.01, 0.02, 0.05, 0.1)
"""Shares of the int8 weights that a remedy may keep in 16 bits."""

_N_WINDOWS, _LENGTH = 4, 256
"""The number of windows that are measured, and the largest number of tokens of each."""

_N_MODULES = 10
_ROUNDED = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Cause:
    """What the rounding of one module, or of all modules of a kind, costs the predictions.

    Attributes:
        name: full name of the module, or its last part, such as down_proj.
        n_modules: number of modules.
        weights, inputs: KL divergence in nats a token by rounding the weights, and the inputs.
    """

    name: str
    n_modules: int
    weights: float
    inputs: float

    @property
    def cost(self) -> float:
        return self.weights + self.inputs


@dataclass(frozen=True, slots=True)
class Remedy:
    """A conversion whose predictions are expected to be nearer to the source's.

    Attributes:
        keep: modules that stay 16-bit in it, beside those that are.
        share: their share of the int8 weights, 0 to 1.
        n_bytes: bytes that they take more than in int8.
        mean_kl: the expected mean KL divergence in nats a token.
        is_enough: whether it is expected to meet the gates.
        command: its command line; "" if the checkpoint was exported, and no one command makes it.
    """

    keep: tuple[str, ...]
    share: float
    n_bytes: int
    mean_kl: float
    is_enough: bool
    command: str = ""


@dataclass(frozen=True, slots=True)
class Causes:
    """The causes of a divergence under one arithmetic, estimated.

    Attributes:
        mode: the arithmetic, one of `fidelity.arithmetic.MODES`.
        n_tokens: number of tokens of the estimate.
        weights, inputs: KL divergence in nats a token by rounding all weights, and all inputs.
        kinds: the same for each kind of module, the costliest first.
        modules: the same for the costliest modules.
        source_dtype: the dtype of most of the source's weights, as safetensors names it.
        source_rounding: KL divergence in nats a token by the rounding of the source's weights to that dtype; None if it
            is neither F16 nor BF16.
        remedy: a conversion that is expected to be better; None if no gate was broken.
    """

    mode: str
    n_tokens: int
    weights: float
    inputs: float
    kinds: tuple[Cause, ...]
    modules: tuple[Cause, ...]
    source_dtype: str
    source_rounding: float | None
    remedy: Remedy | None = None


@dataclass(frozen=True, slots=True)
class Damage:
    """The damage of the modules that are int8 in a checkpoint, estimated on its source.

    Attributes:
        layers: the modules that ran.
        n_tokens: number of tokens of the estimate.
        n_int8_weights: number of the checkpoint's int8 weights, of modules that did not run too.
        source_dtype: the dtype of most of the source's weights.
    """

    layers: tuple[LayerDamage, ...]
    n_tokens: int
    n_int8_weights: int
    source_dtype: str


def measure_damage(
    source: CheckpointSource,
    out: CheckpointSource,
    windows: TokenWindows,
    report: FidelityReport,
    *,
    trust_remote_code: bool,
    on_event: EventSink,
) -> Damage:
    """Estimate what the rounding of each int8 module of a checkpoint costs, on the first windows of a text.

    Args:
        report: what was measured: the same device and threshold are used.

    Raises:
        Int8ConvertError: the source does not fit in memory, or has no gradient.
    """
    dtypes: Counter[str] = Counter()
    for tensor in source.tensors:
        dtypes[tensor.dtype] += tensor.n_elements
    ((dtype, _),) = dtypes.most_common(1)
    weights = open_int8_checkpoint(out).weights
    part = replace(windows, ids=windows.ids[:_N_WINDOWS, :_LENGTH])
    layers = estimate_in_memory(
        source,
        [weight.module_name for weight in weights],
        part,
        report.device,
        trust_remote_code=trust_remote_code,
        on_event=on_event,
        hint="run int8convert outliers SRC --text FILE --damage on a machine with more memory",
        threshold=report.threshold or math.inf,  # 0 finds no outliers either
        dtype=_ROUNDED.get(dtype),
        planned=_folded_plan(source, out, trust_remote_code),
    )
    return Damage(layers, part.ids.numel(), sum(weight.codes.stored.n_elements for weight in weights), dtype)


def _folded_plan(source: CheckpointSource, out: CheckpointSource, trusts_code: bool) -> ConversionPlan | None:
    """Return the plan by which a checkpoint's weights were rotated or smoothed; None if they were not."""
    request = read_recorded_request(out.directory)
    if request is None or not (request.rotate or request.rotate_inputs or request.smooth):
        return None
    modules = ModuleFilter(output_format=Format(request.format), trusts_code=trusts_code)
    smoothing = open_factors(out.directory / SMOOTHING_FILE) if request.smooth else None
    wanted = PlanRequest(
        source, modules, rotates=request.rotate, rotates_inputs=request.rotate_inputs, smoothing=smoothing
    )
    return plan_conversion(wanted)


def find_causes(damage: Damage, report: FidelityReport) -> Causes:
    """Sort the damage by kind and module, for the arithmetic that ran."""
    inputs = _inputs_of(report.mode)
    modules = [Cause(each.module_name, 1, each.weights, each.of_inputs(inputs)) for each in damage.layers]
    kinds: dict[str, list[Cause]] = {}
    for cause in modules:
        kinds.setdefault(cause.name.rpartition(".")[2], []).append(cause)
    whole = _together("", modules)
    is_rounded = damage.source_dtype in _ROUNDED
    return Causes(
        mode=report.mode,
        n_tokens=damage.n_tokens,
        weights=whole.weights,
        inputs=whole.inputs,
        kinds=_costliest(_together(kind, causes) for kind, causes in kinds.items()),
        modules=_costliest(modules)[:_N_MODULES],
        source_dtype=damage.source_dtype,
        source_rounding=sum(each.source_rounding for each in damage.layers) if is_rounded else None,
    )


def _inputs_of(mode: str) -> str | None:
    """Return the field of `LayerDamage` for the inputs of an arithmetic; None if it does not round them."""
    if mode == WEIGHT_ONLY:
        return None
    if OutlierMode(mode).block_size:
        return "inputs_by_blocks"
    return "inputs_by_token" if mode == OutlierMode.NONE else "inputs_by_rule"


def _together(name: str, causes: Sequence[Cause]) -> Cause:
    return Cause(name, len(causes), sum(each.weights for each in causes), sum(each.inputs for each in causes))


def _costliest(causes: Iterable[Cause]) -> tuple[Cause, ...]:
    return tuple(sorted(causes, key=lambda cause: -cause.cost))


def choose_remedy(damage: Damage, report: FidelityReport, gates: Gates) -> Remedy | None:
    """Choose the modules to keep; None if nothing can be gained. The difference in log-likelihood is expected to fall
    as the divergence does."""
    inputs = _inputs_of(report.mode)
    whole = sum(layer.cost(inputs) for layer in damage.layers)
    highest = ((report.mean_kl_interval[1], gates.max_kl), (report.delta_nll_interval[1], gates.max_dnll))
    remedy = None
    for budget in BUDGETS:
        kept = choose_kept(damage.layers, budget * damage.n_int8_weights, inputs)
        if not kept or not whole > 0:
            continue
        n_weights = sum(layer.n_weights for layer in kept)
        left = 1 - sum(layer.cost(inputs) for layer in kept) / whole
        remedy = Remedy(
            keep=tuple(layer.module_name for layer in kept),
            share=n_weights / damage.n_int8_weights,
            n_bytes=(DTYPE_BYTES[damage.source_dtype] - 1) * n_weights,
            mean_kl=left * report.mean_kl,
            is_enough=all(left * high <= gate for high, gate in highest),
        )
        if remedy.is_enough:
            break
    return remedy


def with_command(remedy: Remedy, found: Provenance, out: str, trust_remote_code: bool) -> Remedy:
    """Add the command line, which writes a new directory. No checkpoint records the folder of its calibration.

    Args:
        found: how the checkpoint was made; only the source and the format if another tool made it.
        out: the checkpoint, as the caller named it.
    """
    if found.exports:
        return remedy
    place = os.path.normpath(out) if os.path.isdir(out) else out.rpartition("/")[2]
    words = ["int8convert", "quantize", found.reference, f"{place}-kept"]
    words += ["--format", found.format] if found.format != DEFAULT_FORMAT else []
    words += ["--revision", found.revision] if found.revision is not None else []
    repeated = {"--only": found.only, "--skip": (*found.skip, *remedy.keep), "--allow-missing": found.allow_missing}
    words += [word for option, patterns in repeated.items() for pattern in patterns for word in (option, pattern)]
    words += [
        option for option, is_on in (("--rotate", found.rotate), ("--rotate-inputs", found.rotate_inputs)) if is_on
    ]
    words += ["--smooth", str(found.factors)] if found.factors is not None else []
    words += ["--threshold", f"{found.threshold:g}"] if found.threshold not in (None, OUTLIER_THRESHOLD) else []
    words += ["--calibration", "CAL", "--round", "calibrated"] if found.calibrated else []
    words += ["--on-nonfinite", "keep"] if found.kept_for_values else []
    words += ["--trust-remote-code"] if trust_remote_code else []
    return replace(remedy, command=shlex.join(words))
