"""Quantizes a model in memory, in place.

Linear layers, GPT-2's Conv1D and the projections of nn.MultiheadAttention become int8, one after the other, so memory
never holds two models. Not replaced: weights that several modules share, such as an output head tied to the embedding;
modules whose weight transformers' model code reads (`weight_reads`); modules with a `forward` of their own; and those
that transformers leaves alone in its models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.errors import CoverageError, FormatError, NonFiniteWeightError, PatternError
from int8convert.formats.format import Format
from int8convert.formats.layers import is_conv1d_layer
from int8convert.formats.modules import module_of
from int8convert.patterns import matches
from int8convert.runtime.attention import Int8MultiheadAttention, leave_fast_path
from int8convert.runtime.hastened.float_linear import restore
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.stored_columns import StoredOutliers, save_with_outliers
from int8convert.runtime.weight_reads import modules_with_read_weights
from int8convert.transformers_internals import (
    get_keys_to_not_convert,
    kept_in_fp32,
    mark_quantized,
    should_convert_module,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_(
    model: nn.Module,
    *,
    skip: Sequence[str] = (),
    outliers: str | Mapping[str, StoredOutliers] = OutlierMode.DYNAMIC,
    threshold: float = OUTLIER_THRESHOLD,
) -> nn.Module:
    """Replace the Linear layers of a model by int8 ones.

    Does not know how accurate the result is: compare its outputs with the model's before. Does not know what code
    outside transformers and torch reads of a weight. Hooks on replaced layers are lost. A model of transformers can be
    saved by its save_pretrained, for `int8convert.load` and for transformers with bitsandbytes.

    Args:
        model: any module that has such layers; changed in place. Weights in other dtypes than float16, bfloat16 and
            float32 stay.
        skip: modules that stay as they are, by full name or dotted tail, with shell wildcards; besides those that
            transformers leaves out of its models, such as the output head.
        outliers: a mode, see `int8convert.runtime.modes`; or the columns that `calibrate` found in this model, which
            layers then store, with a guard for others.
        threshold: magnitude from which a column is an outlier.

    Returns:
        the same model.

    Raises:
        PatternError: a pattern of `skip` matches no module.
        NonFiniteWeightError: a weight holds NaN or infinity.
        CoverageError: the model has no layer that could become int8.
        ValueError: the model is such a layer itself, or `outliers` belongs to another model.
        All are raised before anything is changed.
    """
    stored = {} if isinstance(outliers, str) else outliers
    mode = OutlierMode(outliers) if isinstance(outliers, str) else OutlierMode.STATIC_GUARD
    restore(model)
    names = modules_to_replace(model, skip)
    for name in names:
        _check_finite(name, model.get_submodule(name))
    _check_outliers(model, stored)
    places = defaultdict(list)  # a module may stand in several, and be one all the same
    for name, module in model.named_modules(remove_duplicate=False):
        places[id(module)].append(name)
    loader_replaces = module_of(Format.BITSANDBYTES).replaces
    lost = [name for name in names if not loader_replaces(model.get_submodule(name))]
    for name in names:
        module = model.get_submodule(name)
        new = _int8_form(name, module, mode, threshold, stored)
        for place in places[id(module)]:
            model.set_submodule(place, new)
    leave_fast_path(model)
    if hasattr(model, "_keep_in_fp32_modules"):
        mark_quantized(model)  # Jamba then calls a layer whose weight it would read
        describe_for_saving(model, lost, threshold, stored)
    return model


def modules_to_replace(model: nn.Module, skip: Sequence[str] = ()) -> list[str]:
    """Return the names of the modules that `quantize_` replaces. Arguments and errors are those of `quantize_`."""
    if _is_replaceable(model):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place: use "
            "Int8Linear.from_float(layer.weight, layer.bias)"
        )
    of_attention = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    modules = {n: m for n, m in model.named_modules() if _is_replaceable(m) and id(m) not in of_attention}
    if not modules and not any(isinstance(module, Int8Linear) for module in model.modules()):
        raise CoverageError(
            f"{type(model).__name__} has no layer that could become int8",
            "give a model with Linear, Conv1D or nn.MultiheadAttention layers in float16, bfloat16 or float32",
        )
    for pattern in skip:
        if not any(matches(name, pattern) for name in modules):
            raise PatternError(f"skip {pattern!r} matches no module that could become int8", "correct the pattern")
    # torch's layers read weights on their fast path, which `leave_fast_path` closes.
    read = modules_with_read_weights(model, reads_of_torch=False)
    shared = {key for key, n in Counter(map(id, _parameters(model))).items() if n > 1}
    return [
        name
        for name in _without_default_skips(model, modules)
        if not any(matches(name, pattern) for pattern in skip)
        and name not in read
        and shared.isdisjoint(map(id, modules[name].parameters()))
    ]


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return every parameter, once for each module that holds it."""
    return [p for module in model.modules() for p in module.parameters(recurse=False)]


def _without_default_skips(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names that transformers would quantize, if the model is its own; else all."""
    if not hasattr(model, "_keep_in_fp32_modules"):
        return list(names)
    skips = [*get_keys_to_not_convert(model), *kept_in_fp32(model)]
    return [name for name in names if should_convert_module(name, skips)]


def _is_replaceable(module: nn.Module) -> bool:
    """Return whether a module has an int8 form here. A subclass of Linear with a `forward` of its own has none."""
    if any(p.dtype not in _DTYPES for p in module.parameters(recurse=False)):
        return False
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_linear or is_conv1d_layer(module) or Int8MultiheadAttention.can_replace(module)


def _check_finite(name: str, module: nn.Module) -> None:
    for leaf, weight in module.named_parameters():
        if leaf.endswith("weight") and not bool(torch.isfinite(weight).all()):
            n_bad = int((~torch.isfinite(weight)).sum())
            raise NonFiniteWeightError(
                f"'{name}.{leaf}' holds {n_bad:,} {'value' if n_bad == 1 else 'values'} that are NaN or infinite",
                f"correct it, or leave the module as it is with skip=['{name}']",
                name,
            )


def _check_outliers(model: nn.Module, stored: Mapping[str, StoredOutliers]) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    for name, outliers in stored.items():
        weight = getattr(modules.get(name), "weight", None)
        size = None if weight is None else weight.shape[::-1] if is_conv1d_layer(modules[name]) else weight.shape
        columns = outliers.columns
        if size is None or outliers.weight.shape != (size[0], columns.numel()) or (columns >= size[1]).any():
            raise ValueError(f"the outlier columns for {name!r} fit no layer of the model: calibrate this model again")


def _int8_form(
    name: str, module: Any, mode: OutlierMode, threshold: float, stored: Mapping[str, StoredOutliers]
) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention):
        return Int8MultiheadAttention.from_float(module, mode, threshold)
    weight = module.weight.detach()
    layer = Int8Linear.from_float(
        weight.t().contiguous() if is_conv1d_layer(module) else weight, module.bias, mode=mode, threshold=threshold
    )
    if name in stored:
        layer.set_outliers(stored[name].columns, stored[name].weight)
    return layer.train(module.training)


def describe_for_saving(
    model: Any, lost: Iterable[str], threshold: float, stored: Mapping[str, StoredOutliers]
) -> None:
    """Set the quantization block of a transformers model's config; refuse saving if no loader could read the model.

    Args:
        lost: int8 modules that the loader does not replace.
        stored: module -> outlier columns.
    """
    layout = module_of(Format.BITSANDBYTES)
    left = [name for name, module in model.named_modules() if layout.replaces(module)]
    int8 = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    covered = layout.covered(int8, [*left, *kept_in_fp32(model)])
    lost = [*lost, *(name for name in int8 if name in covered)]
    if lost:
        refuse_saving(model, lost[0], "leave that module out with quantize_(skip=...)")
        return
    model.config.quantization_config = layout.block(left, threshold)
    if stored:
        model.save_pretrained = MethodType(save_with_outliers, model)


def refuse_saving(model: Any, name: str, hint: str) -> None:
    """Make `save_pretrained` raise a FormatError: no loader would take the module `name` for int8."""
    model.save_pretrained = partial(_refuse_to_save, name, hint)


def _refuse_to_save(name: str, hint: str, *_: Any, **__: Any) -> None:
    raise FormatError(f"no loader would look for '{name}' as int8, so this model cannot be saved", hint)
