"""Which columns of each layer's input are outliers, found by running text through a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.runtime.linear import Int8Linear, OutlierMode
from int8convert.runtime.outliers import StoredOutliers

MAX_TOKENS = 512
"""Of each text."""


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
    token's output independent of its batch but no more faithful, and run with a guard from now on. Columns that they
    have stored already stay, with the weights they had.

    Does not know what other texts would show: a column none of these reaches is left to the guard. Nor does it see
    into nn.MultiheadAttention, whose int8 form has the guard alone.

    Args:
        model: with Linear layers; transformers' models, or any module that takes token ids. Runs in evaluation mode.
        texts: strings, for which a tokenizer is needed, or token ids [tokens] or [batch, tokens]. Cut to MAX_TOKENS or
            what the model takes; those without any token are left out.
        tokenizer: transformers'.
        threshold: magnitude from which a column is an outlier.

    Returns:
        module name -> its outlier columns and their weights, layers without any included, with none.

    Raises:
        ValueError: there is no text, or no tokenizer for it.
    """
    layers = {name: module for name, module in model.named_modules() if _in_features(module) is not None}
    with torch.no_grad(), _watching(layers) as largest, _evaluating(model):
        device = next(model.parameters()).device
        n_texts = 0
        for text in [texts] if isinstance(texts, str) else texts:
            ids = _token_ids(model, text, tokenizer).to(device)
            if ids.numel():
                model(ids, **({"decoder_input_ids": ids} if _is_encoder_decoder(model) else {}))
                n_texts += 1
    if not n_texts:
        raise ValueError("no text to calibrate with: give at least one that has tokens")
    # NaN is no number below the threshold.
    return {name: _outliers(module, ~(largest[name] < threshold)) for name, module in layers.items()}


@contextmanager
def _watching(layers: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep the largest magnitude of each column of each layer's inputs, as long as this lasts."""
    largest = {name: torch.zeros(_in_features(module) or 0) for name, module in layers.items()}

    def watch(name: str) -> Any:
        def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            x = (*inputs, *named.values())[0].detach()
            if x.numel():  # an expert that nobody chose
                seen = x.abs().reshape(-1, x.shape[-1]).amax(0).float().cpu()
                largest[name] = torch.maximum(largest[name], seen)

        return before

    hooks = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which makes what it leaves larger; then as it was, module by module."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _token_ids(model: Any, text: str | torch.Tensor, tokenizer: Any) -> torch.Tensor:
    n_positions = getattr(getattr(model, "config", None), "max_position_embeddings", None) or MAX_TOKENS
    n_tokens = min(MAX_TOKENS, n_positions)
    if isinstance(text, torch.Tensor):
        return (text if text.dim() == 2 else text[None])[:, :n_tokens]
    if tokenizer is None:
        raise ValueError("texts as strings need a tokenizer")
    return torch.tensor([tokenizer(text, truncation=True, max_length=n_tokens)["input_ids"]], dtype=torch.long)


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _in_features(module: Any) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.nx if type(module).__name__ == "Conv1D" else None


def _outliers(module: Any, is_outlier: torch.Tensor) -> StoredOutliers:
    if isinstance(module, Int8Linear):
        is_outlier[module.outlier_columns.long().cpu()] = True
    columns = is_outlier.nonzero().flatten().to(torch.int32)
    at = columns.to(module.weight.device).long()
    if isinstance(module, Int8Linear):
        found = StoredOutliers(columns, module.dequantize(module.outlier_weight.dtype)[:, at])
        module.set_outliers(found.columns, found.weight)
        module.mode = OutlierMode.STATIC_GUARD
        return found
    weight = module.weight.detach()
    return StoredOutliers(columns, (weight[at].t() if type(module).__name__ == "Conv1D" else weight[:, at]).clone())
