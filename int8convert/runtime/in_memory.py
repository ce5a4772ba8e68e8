"""Quantizing a model that is in memory, in place: convert, and use immediately.

Linear layers, GPT-2's Conv1D and the projections of nn.MultiheadAttention become int8, one after the other, so that
memory never holds two models. Left alone: weights that several modules share, such as an output head tied to the
embedding, and for transformers' models what transformers itself would leave alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.errors import NonFiniteWeightError, PatternError
from int8convert.runtime.attention import Int8MultiheadAttention
from int8convert.runtime.linear import Int8Linear, OutlierMode
from int8convert.runtime.outliers import StoredOutliers


def quantize_(
    model: nn.Module,
    *,
    skip: Sequence[str] | None = None,
    outliers: str | Mapping[str, StoredOutliers] = OutlierMode.DYNAMIC,
    threshold: float = OUTLIER_THRESHOLD,
) -> nn.Module:
    """Replace the Linear layers of a model by int8 ones.

    Does not know how well the result works: compare its outputs with the model's own before.

    Args:
        model: any module; changed in place. Its weights in float16, bfloat16 or float32.
        skip: modules that stay as they are, by full name or dotted tail, with shell wildcards; None leaves out what
            transformers would, such as the output head.
        outliers: a mode, see `int8convert.runtime.linear`; or what `calibrate` found in this model, by which layers
            store their outlier columns, with a guard for others.
        threshold: magnitude from which a column is an outlier.

    Returns:
        the same model.

    Raises:
        PatternError: a pattern of `skip` matches no module.
        NonFiniteWeightError: a weight holds NaN or infinity; the modules before it are int8 already.
    """
    stored = {} if isinstance(outliers, str) else outliers
    mode = OutlierMode(outliers) if isinstance(outliers, str) else OutlierMode.STATIC_GUARD
    for name in _modules_to_replace(model, skip):
        module = model.get_submodule(name)
        new = _int8_form(name, module, mode, threshold, stored)
        if name:
            model.set_submodule(name, new)
        else:
            raise PatternError(
                f"the model is a {type(module).__name__} itself, which nothing holds that could hold its int8 form",
                "Int8Linear.from_float(layer.weight, layer.bias) makes one",
            )
    return model


def _modules_to_replace(model: nn.Module, skip: Sequence[str] | None) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if _is_replaceable(module)}
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, nn.MultiheadAttention))
    for pattern in skip or ():
        if not any(_matches(name, pattern) for name in modules):
            raise PatternError(f"skip {pattern!r} matches no module that could become int8", "nothing was changed")
    patterns = [*(skip or ()), *(_default_skips(model) if skip is None else ())]
    shared = {key for key, n in Counter(map(id, _parameters(model))).items() if n > 1}
    return [
        name
        for name, module in modules.items()
        if not any(_matches(name, pattern) for pattern in patterns)
        and not name.startswith(inside or ("\0",))
        and shared.isdisjoint(map(id, module.parameters()))
    ]


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter, as often as a module holds it."""
    return [p for module in model.modules() for p in module.parameters(recurse=False)]


def _default_skips(model: nn.Module) -> list[str]:
    if not hasattr(model, "_keep_in_fp32_modules"):
        return []
    from transformers.quantizers.base import get_keys_to_not_convert

    return [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]  # type: ignore[misc]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_replaceable(module: nn.Module) -> bool:
    """A subclass of Linear that computes something else than Linear does stays what it is."""
    if isinstance(module, Int8Linear):
        return False
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_linear or _is_conv1d(module) or Int8MultiheadAttention.can_replace(module)


def _int8_form(
    name: str, module: Any, mode: OutlierMode, threshold: float, stored: Mapping[str, StoredOutliers]
) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention):
        return Int8MultiheadAttention.from_float(module, mode, threshold)
    weight = module.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteWeightError(
            f"'{name}.weight' holds {int((~torch.isfinite(weight)).sum()):,} values that are NaN or infinite",
            f"mend it, or leave the module as it is with skip=['{name}']",
            name,
        )
    layer = Int8Linear.from_float(
        weight.t().contiguous() if _is_conv1d(module) else weight, module.bias, mode=mode, threshold=threshold
    )
    if name in stored:
        layer.set_outliers(stored[name].columns, stored[name].weight)
    return layer.train(module.training)
