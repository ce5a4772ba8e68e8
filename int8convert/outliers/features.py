"""Outlier feature dimensions: which they are, by the paper's criteria and by the rule that a threshold works by.

- Outlier columns of one layer's input: those that reach the threshold at any token. By this rule a layer in dynamic
  mode decides what stays 16-bit.
- Outlier features of the model: dimensions of the hidden state that reach the threshold in at least 25 % of the layers,
  and at 6 % of the sequence positions or more, counted over all hidden states (Sec. 4.1). Hidden states are the inputs
  of the Linear layers as wide as the hidden size; layers that read the same one, such as q_proj, k_proj and v_proj,
  count once. The second matrix of a feed-forward block reads other dimensions, and the paper leaves it out.

Does not know why a dimension is one, nor whether it matters to the model: that is what `ablation` is for.
Source: LLM.int8(), arXiv:2208.07339, Sec. 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from int8convert.outliers.statistics import InputStatistics
from int8convert.outliers.values import OutlierValues, quartiles

MIN_LAYER_SHARE = 0.25
MIN_POSITION_SHARE = 0.06

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
_POSITIVE, _NEGATIVE, _TWO_SIDED = "positive", "negative", "two-sided"


@dataclass(frozen=True, slots=True)
class OutlierColumn:
    """A column of one layer's input that reached the threshold.

    Attributes:
        column: index of the input feature.
        share: of the tokens at which it did, 0 to 1.
        extreme: the value of the largest magnitude, with its sign; infinite if a value was NaN.
        sides: "positive" or "negative" if all that reached the threshold had that sign, else "two-sided".
        quartiles: of the values that reached it; None past the first columns, see `outlier_values.MAX_COLUMNS`.
    """

    column: int
    share: float
    extreme: float
    sides: str
    quartiles: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What one Linear layer reads.

    Attributes:
        module_name: of that layer.
        layer: the part of its name that says which block of the model it is in; "" for none.
        projection: the last part: q_proj, fc1.
        n_features: how wide its input is.
        n_tokens: how many passed.
        extreme: the largest magnitude of all columns.
        is_hidden_state: whether it counts for the paper's statistics.
        columns: those with outliers, ascending.
    """

    module_name: str
    layer: str
    projection: str
    n_features: int
    n_tokens: int
    extreme: float
    is_hidden_state: bool
    columns: tuple[OutlierColumn, ...]


@dataclass(frozen=True, slots=True)
class OutlierFeature:
    """A dimension of the hidden state that meets the paper's criteria.

    Attributes:
        layer_share, position_share: where it reaches the threshold, 0 to 1.
        others: as for `OutlierColumn`, over all hidden states.
    """

    column: int
    layer_share: float
    position_share: float
    extreme: float
    sides: str
    quartiles: tuple[float, float, float] | None


def layer_of(module_name: str) -> str:
    """The block of a model a module is in: "model.layers.3" of "model.layers.3.mlp.up_proj"; "" if it is in none."""
    match = _LAYER.match(module_name)
    return match[0] if match else ""


def describe_inputs(
    statistics: Mapping[str, InputStatistics], values: Mapping[str, OutlierValues], hidden_size: int
) -> tuple[LayerInput, ...]:
    """What each layer reads, of those that were run; in the order given.

    Args:
        statistics, values: of the same layers, gathered with one threshold.
        hidden_size: width of the hidden state.
    """
    found = []
    for name, seen in statistics.items():
        if seen.n_tokens:
            columns = (seen.n_above + seen.n_below).nonzero().flatten().tolist()
            layer = layer_of(name)
            found.append(
                LayerInput(
                    module_name=name,
                    layer=layer,
                    projection=name.rpartition(".")[2],
                    n_features=len(seen.maximum),
                    n_tokens=seen.n_tokens,
                    extreme=float(seen.largest.max()),
                    is_hidden_state=bool(layer) and len(seen.maximum) == hidden_size,
                    columns=tuple(_describe_column(k, [seen], [values[name]]) for k in columns),
                )
            )
    return tuple(found)


def find_features(
    inputs: Sequence[LayerInput], statistics: Mapping[str, InputStatistics], values: Mapping[str, OutlierValues]
) -> tuple[OutlierFeature, ...]:
    """The dimensions that meet the paper's criteria, ascending.

    Args:
        inputs: what `describe_inputs` made of the rest.
    """
    states = _hidden_states(inputs, statistics)
    if not states:
        return ()
    layers = sorted({layer_of(name) for name in states})
    n_reached = torch.stack([statistics[name].n_above + statistics[name].n_below for name in states])
    n_tokens = torch.tensor([statistics[name].n_tokens for name in states])
    position_share = n_reached.sum(0).double() / n_tokens.sum()
    in_layer = torch.stack(
        [n_reached[[i for i, name in enumerate(states) if layer_of(name) == layer]].any(0) for layer in layers]
    )
    layer_share = in_layer.double().mean(0)
    is_feature = (layer_share >= MIN_LAYER_SHARE) & (position_share >= MIN_POSITION_SHARE)
    features = []
    for k in is_feature.nonzero().flatten().tolist():
        whole = _describe_column(k, [statistics[name] for name in states], [values[name] for name in states])
        features.append(
            OutlierFeature(
                k, float(layer_share[k]), float(position_share[k]), whole.extreme, whole.sides, whole.quartiles
            )
        )
    return tuple(features)


def _hidden_states(inputs: Sequence[LayerInput], statistics: Mapping[str, InputStatistics]) -> list[str]:
    """The layers whose inputs are counted: of those in one block that read the same, the first."""
    first: list[str] = []
    for entry in inputs:
        seen = statistics[entry.module_name]
        is_known = any(
            layer_of(name) == entry.layer
            and statistics[name].n_tokens == seen.n_tokens
            and torch.equal(statistics[name].sum_squares, seen.sum_squares)
            for name in first
        )
        if entry.is_hidden_state and not is_known:
            first.append(entry.module_name)
    return first


def _describe_column(k: int, seen: Sequence[InputStatistics], values: Sequence[OutlierValues]) -> OutlierColumn:
    """A column over the inputs of one layer or of several."""
    n_above, n_below = (sum(int(getattr(s, name)[k]) for s in seen) for name in ("n_above", "n_below"))
    extremes = [float(limit[k]) for s in seen for limit in (s.maximum, s.minimum)]
    counts = [v.counts[k] for v in values if k in v.counts]
    return OutlierColumn(
        column=k,
        share=(n_above + n_below) / sum(s.n_tokens for s in seen),
        extreme=max(extremes, key=abs),
        sides=_TWO_SIDED if n_above and n_below else _POSITIVE if n_above else _NEGATIVE,
        quartiles=quartiles(torch.stack(counts).sum(0), values[0].threshold) if counts else None,
    )
