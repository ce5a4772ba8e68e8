"""Runs text through a model in memory to choose which input columns to store in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.calibration.run import run_tokens
from int8convert.calibration.statistics import watching
from int8convert.calibration.weight_squares import weight_squares
from int8convert.formats.layers import features_of, is_conv1d_layer
from int8convert.outliers.choice import BUDGET, MIN_SHARE, choose_columns
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.runtime.stored_columns import StoredOutliers

MAX_TOKENS = 512
"""Tokens of each text that are run."""


def choose_outliers(
    model: Any,
    texts: Iterable[str | torch.Tensor],
    *,
    tokenizer: Any = None,
    threshold: float = OUTLIER_THRESHOLD,
    min_share: float = MIN_SHARE,
    budget: float = BUDGET,
) -> dict[str, StoredOutliers]:
    """Find the input columns worth storing, layer by layer, by the rule of `int8convert.outliers.choice`.

    For a model in 16 or 32 bits the returned weights are its own, so `quantize_(model, outliers=...)` stores them
    exactly. An int8 model has its weights only as codes. Its layers then store what these stand for, and run with a
    guard from now on: a token's output becomes independent of its batch, but no more faithful. Columns that are stored
    already keep their weights.

    Does not know what other texts would show: a column that is no outlier in these is left to the guard. Does not see
    into nn.MultiheadAttention, whose int8 form has the guard alone.

    Args:
        model: with Linear layers; transformers' models, or any module that takes token ids. Runs in evaluation mode.
        texts: strings, which need a tokenizer, or token ids [tokens] or [batch, tokens]. Cut to MAX_TOKENS or what the
            model takes; texts without tokens are left out.
        tokenizer: a tokenizer of transformers.
        threshold: magnitude from which a column is an outlier.
        min_share: share of the tokens, 0 to 1, at which a column must reach it to be stored; at 0, one token is enough.
        budget: bytes for further columns, as a share of the bytes of the int8 weights.

    Returns:
        module name -> its outlier columns and their weights; layers without any are included.

    Raises:
        ValueError: there is no text, or no tokenizer for it.
    """
    layers = {name: module for name, module in model.named_modules() if features_of(module) is not None}
    with torch.no_grad(), watching(layers, threshold) as statistics, _evaluating(model):
        n_texts = 0
        for text in [texts] if isinstance(texts, str) else texts:
            ids = _token_ids(model, text, tokenizer)
            if ids.numel():
                run_tokens(model, ids)
                n_texts += 1
    if not n_texts:
        raise ValueError("no text to calibrate with: give at least one that has tokens")
    int8 = [name for name, module in layers.items() if isinstance(module, Int8Linear)]
    columns = choose_columns(
        {name: weight_squares(module) for name, module in layers.items()},
        statistics,
        min_share=min_share,
        budget=budget,
        budgeted=int8 or modules_to_replace(model),
    )
    return {name: _outliers(module, columns[name]) for name, module in layers.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without dropout, until the context ends."""
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


def _outliers(module: Any, columns: torch.Tensor) -> StoredOutliers:
    if isinstance(module, Int8Linear):
        columns = torch.cat((columns, module.outlier_columns.cpu())).unique()
    at = columns.to(module.weight.device).long()
    if isinstance(module, Int8Linear):
        found = StoredOutliers(columns, module.dequantize(module.outlier_weight.dtype)[:, at])
        module.set_outliers(found.columns, found.weight)
        module.mode = OutlierMode.STATIC_GUARD
        return found
    weight = module.weight.detach()
    return StoredOutliers(columns, (weight[at].t() if is_conv1d_layer(module) else weight[:, at]).clone())
