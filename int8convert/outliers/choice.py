"""Chooses the input columns of each layer to store in 16 bits, so that few bytes take away much of the error.

Rounding to int8 adds an error to each output of a layer. Summed over the outputs, its expected square has a part that
each input column k contributes by itself:

    error[k] = E[x_k^2] * sum_n w_step[n]^2 / 12   +   E[x_step^2] / 12 * sum_n w[n, k]^2

with w_step[n] = weight_absmax[n] / 127 and x_step = x_absmax / 127 of a token without its outlier columns: a rounding
error is spread evenly over one step, whose variance is step^2 / 12. In 16 bits the column contributes none. Hence:

1. Columns that reach the threshold at `min_share` of the tokens are stored: the paper's outlier features do so at 6 %
   or more (Sec. 4.1). Rarer ones are found by the guard when they occur; the int8 codes are good enough for them.
2. Of all other columns of all layers, those are stored that take away most error for their bytes, until `budget` is
   spent. The error of a layer is measured against the variance of its output, or, where `damage` was measured, by what
   it costs the predictions.

So memory is bounded, however long the text, although more text makes more columns reach the threshold once. Point 2
uses no magnitude, so models whose activations are all small are served as well.

Measured on a trained model with injected outlier features (scripts/outlier_injection.py), 48 x 256 tokens, mean KL to
float32, calibrated on 16 other sequences: storing every column that ever reaches 6.0 takes 4.1 % of the int8 bytes and
leaves 3.9e-5. This rule takes 3.7 % and leaves 3.3e-5, and 4 or 48 sequences change that by 2 %. A threshold of 3.0
comes to 1.8e-5, with 82 % of the int8 bytes. docs/results/static-set.md has the table.

Without `damage` it does not know how an error propagates: that of the first layer counts as that of the last. On a
trained Qwen2 of 0.5B the choice by damage left 0.96 and 0.87 of the KL divergence at 3 % and 6 % of the int8 bytes.
Source: LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from int8convert.calibration.statistics import InputStatistics
from int8convert.calibration.weight_squares import WeightSquares

MIN_SHARE = 0.06
BUDGET = 0.01
"""Bytes of the columns stored on top of the frequent ones, as a share of the bytes of the int8 weights."""

_STORED_BYTES = 2


def choose_columns(
    weights: Mapping[str, WeightSquares],
    statistics: Mapping[str, InputStatistics],
    *,
    min_share: float = MIN_SHARE,
    budget: float = BUDGET,
    budgeted: Iterable[str] | None = None,
    damage: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Choose the columns to store: layer name -> int32 [n], ascending, on the CPU; layers without any are included.

    Args:
        weights: layer name -> the squares of its weight; where these are NaN, only frequent columns are chosen.
        statistics: the statistics of these layers, see `statistics.watching`.
        min_share: share of the tokens, 0 to 1; at 0, one token that reaches the threshold is enough.
        budget: see `BUDGET`.
        budgeted: layers whose bytes make the budget, and whose columns it buys; None for all.
        damage: layer name -> what each column costs the predictions, see `LayerDamage.columns`. It then replaces the
            error of point 2, and layers without it get frequent columns only.
    """
    is_stored = {}
    for name, seen in statistics.items():
        is_stored[name] = (seen.share > 0) & (seen.share >= min_share)
    names = [name for name in (statistics if budgeted is None else budgeted) if name in statistics]
    removed = {name: removed_error(weights[name], statistics[name]) for name in names}
    if damage is not None:
        removed = {name: damage.get(name, torch.zeros_like(error)) for name, error in removed.items()}
    _spend(budget, {name: weights[name] for name in names}, removed, is_stored)
    return {name: found.nonzero().flatten().to(torch.int32) for name, found in is_stored.items()}


def _spend(
    budget: float,
    weights: Mapping[str, WeightSquares],
    removed: Mapping[str, torch.Tensor],
    is_stored: dict[str, torch.Tensor],
) -> None:
    """Mark further columns as stored: those with the most error for their bytes, while they fit."""
    if not weights:
        return
    n_columns = [len(weight.columns) for weight in weights.values()]
    n_bytes_left = budget * sum(len(weight.columns) * weight.n_rows for weight in weights.values())
    n_bytes = torch.cat([torch.full((len(w.columns),), _STORED_BYTES * w.n_rows) for w in weights.values()])
    error = torch.cat([removed[name].nan_to_num(0, 0, 0) for name in weights])
    error[torch.cat([is_stored[name] for name in weights])] = 0
    # A stable order: the same text gives the same set.
    order = (error / n_bytes).argsort(descending=True, stable=True)
    bought = order[(error[order] > 0) & (n_bytes[order].cumsum(0) <= n_bytes_left)]
    was_bought = torch.zeros_like(error, dtype=torch.bool).index_fill_(0, bought, True)
    for name, chosen in zip(weights, was_bought.split(n_columns), strict=True):
        is_stored[name] |= chosen


def removed_error(weight: WeightSquares, seen: InputStatistics) -> torch.Tensor:
    """Return 12 * error[k] of the module's formula / variance of the output, [in]: what storing each column takes away.

    0 if nothing is known: no tokens, no weights, or an output that is constant or NaN.
    """
    variance = seen.output_variance
    if not seen.n_tokens or not variance > 0:
        return torch.zeros_like(weight.columns)
    x_squares, x_step_squares = seen.sum_squares / seen.n_tokens, float(seen.step_squares) / seen.n_tokens
    error = x_squares * weight.steps + x_step_squares * weight.columns
    return (error / variance).nan_to_num(0, 0, 0)
