"""Folds the rotation and the smoothing of a plan into the source's model in memory, to measure what rounding costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.formats.layers import is_conv1d_layer
from int8convert.planning.fold import Fold
from int8convert.planning.plan import ConversionPlan
from int8convert.runtime.linear import hadamard_rotated


def fold_model(model: Any, planned: ConversionPlan) -> None:
    """Fold a plan's rotation and smoothing into a model in floating point, which then computes the same.

    Args:
        model: the source's, in float32 on the CPU or another device.
        planned: a plan without folds changes nothing.
    """
    folding = planned.folding
    if folding is None:
        return
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if folding.untied_head is not None:
        name = folding.untied_head.output_name
        own = nn.Parameter(_folded(folding.untied_head.fold, parameters[name], False), requires_grad=False)
        model.get_submodule(name.rpartition(".")[0]).weight = own
        del parameters[name]
    for name, (key, _) in planned.model_map.parameters.items():
        if key not in folding.folds or name not in parameters:
            continue
        fold, _ = folding.folds[key]
        module = model.get_submodule(name.rpartition(".")[0])
        is_transposed = is_conv1d_layer(module) and parameters[name].dim() == 2
        parameters[name].data = _folded(fold, parameters[name], is_transposed)
        if fold.input_block > 1:
            module.register_forward_pre_hook(partial(_rotate_input, shared, fold.input_block))


def _rotate_input(
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]],
    size: int,
    _module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor]:
    """Rotate the input of a layer. Layers that read the same tensor, such as q, k and v, share the rotated one."""
    if size not in shared or shared[size][0] is not inputs[0]:
        shared[size] = inputs[0], hadamard_rotated(inputs[0], size)
    return (shared[size][1],)


def _folded(fold: Fold, parameter: torch.Tensor, is_transposed: bool) -> torch.Tensor:
    values = parameter.detach().t() if is_transposed else parameter.detach()
    folded = torch.from_numpy(fold.load().apply(values.float().cpu().contiguous().numpy(), 0))
    return (folded.t() if is_transposed else folded).to(parameter.device, parameter.dtype)
