"""Which columns of each layer's input are outliers, found by running text through a model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD
from int8convert.runtime.linear import Int8Linear, OutlierMode
from int8convert.runtime.outliers import StoredOutliers

MAX_TOKENS = 512
"""Of each text."""


@torch.no_grad()
def calibrate(
    model: Any,
    texts: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    threshold: float = OUTLIER_THRESHOLD,
) -> dict[str, StoredOutliers]:
    """Find the input columns that reach the threshold at any token, layer by layer.

    On a model in 16 or 32 bits the weights returned are its own, so that `quantize_(model, outliers=...)` stores them
    exact. An int8 model knows its weights only as codes: its layers then store what these stand for, which makes a
    token's output independent of its batch but no more faithful, and run with a guard from now on.

    Does not know what other texts would show: a column none of these reaches is left to the guard.

    Args:
        model: with Linear layers; transformers' models, or any module that takes token ids.
        texts: strings, for which a tokenizer is needed, or token ids [tokens] or [batch, tokens].
        tokenizer: transformers'.
        threshold: magnitude from which a column is an outlier.

    Returns:
        module name -> its outlier columns and their weights, layers without any included, with none.
    """
    layers = {name: module for name, module in model.named_modules() if _in_features(module) is not None}
    largest = {name: torch.zeros(_in_features(module) or 0) for name, module in layers.items()}

    def watch(name: str) -> Any:
        def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen = inputs[0].detach().abs().flatten(0, -2).amax(0).float().cpu()
            largest[name] = torch.maximum(largest[name], seen)

        return before

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    device = next(model.parameters()).device
    try:
        for text in texts:
            model(_token_ids(text, tokenizer).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    # NaN is no number below the threshold.
    return {name: _outliers(module, ~(largest[name] < threshold)) for name, module in layers.items()}


def _token_ids(text: str | torch.Tensor, tokenizer: Any) -> torch.Tensor:
    if isinstance(text, torch.Tensor):
        return text if text.dim() == 2 else text[None]
    if tokenizer is None:
        raise ValueError("texts as strings need a tokenizer")
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS).input_ids
    return ids


def _in_features(module: Any) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.nx if type(module).__name__ == "Conv1D" else None


def _outliers(module: Any, is_outlier: torch.Tensor) -> StoredOutliers:
    columns = is_outlier.nonzero().flatten().to(torch.int32)
    at = columns.to(module.weight.device).long()
    if isinstance(module, Int8Linear):
        scale = module.weight_absmax / N_STEPS
        found = StoredOutliers(columns, (module.weight[:, at] * scale[:, None]).to(module.outlier_weight.dtype))
        module.set_outliers(found.columns, found.weight)
        module.mode = OutlierMode.STATIC_GUARD
        return found
    weight = module.weight.detach()
    return StoredOutliers(columns, (weight[at].t() if type(module).__name__ == "Conv1D" else weight[:, at]).clone())
