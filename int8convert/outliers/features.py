"""Outlier feature dimensions, by the paper's criteria and by the rule of the threshold.

- Outlier columns of one layer's input reach the threshold at any token. By this rule a layer in dynamic mode decides
  what stays 16-bit.
- Outlier features of the model are dimensions of the hidden state that reach the threshold in at least 25 % of the
  layers and at 6 % of the sequence positions, counted over all hidden states (Sec. 4.1). Hidden states are inputs of
  Linear layers as wide as the hidden size. Layers that read the same one, such as q_proj, k_proj and v_proj, count
  once. The second matrix of a feed-forward block reads other dimensions, and the paper leaves it out.

Does not know whether a dimension matters to the model; `ablation` measures that.
Source: LLM.int8(), arXiv:2208.07339, Sec. 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from int8convert.calibration.statistics import InputStatistics, quartiles

MIN_LAYER_SHARE = 0.25
MIN_POSITION_SHARE = 0.06

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
_POSITIVE, _NEGATIVE, _TWO_SIDED = "positive", "negative", "two-sided"


@dataclass(frozen=True, slots=True)
class OutlierColumn:
    """A column of one layer's input that reached the threshold.

    Attributes:
        column: index of the input feature.
        share: share of the tokens at which it did, 0 to 1.
        extreme: the value of the largest magnitude, with its sign; infinite if a value was NaN.
        sides: "positive" or "negative" if all values that reached the threshold had that sign, else "two-sided".
        quartiles: of the values that reached it; None beyond `statistics.MAX_COLUMNS` columns.
    """

    column: int
    share: float
    extreme: float
    sides: str
    quartiles: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class LayerInput:
    """The input of one Linear layer.

    Attributes:
        layer: the part of that name that says which block of the model it is in; "" if none.
        projection: the last part of the name: q_proj, fc1.
        extreme: the largest magnitude of all columns.
        is_hidden_state: whether the input counts for the paper's statistics.
        columns: the columns with outliers, ascending.
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

    All others are those of `OutlierColumn`, over all hidden states.
    """

    column: int
    layer_share: float
    position_share: float
    extreme: float
    sides: str
    quartiles: tuple[float, float, float] | None


def layer_of(module_name: str) -> str:
    """Return the block a module is in: "model.layers.3" for "model.layers.3.mlp.up_proj"; "" if it is in none."""
    match = _LAYER.match(module_name)
    return match[0] if match else ""


def describe_inputs(statistics: Mapping[str, InputStatistics], hidden_size: int) -> tuple[LayerInput, ...]:
    """Describe the input of each layer that was run, in the order given."""
    return tuple(
        LayerInput(
            module_name=name,
            layer=layer_of(name),
            projection=name.rpartition(".")[2],
            n_features=len(seen.maximum),
            n_tokens=seen.n_tokens,
            extreme=float(seen.largest.max()),
            is_hidden_state=bool(layer_of(name)) and len(seen.maximum) == hidden_size,
            columns=tuple(_describe_column(k, [seen]) for k in seen.n_reached.nonzero().flatten().tolist()),
        )
        for name, seen in statistics.items()
        if seen.n_tokens
    )


def find_features(
    inputs: Sequence[LayerInput], statistics: Mapping[str, InputStatistics]
) -> tuple[OutlierFeature, ...]:
    """Return the dimensions that meet the paper's criteria, ascending."""
    states = _hidden_states(inputs, statistics)
    if not states:
        return ()
    seen = [statistics[name] for name in states]
    layers = [layer_of(name) for name in states]
    n_reached = torch.stack([each.n_reached for each in seen])
    position_share = n_reached.sum(0).double() / sum(each.n_tokens for each in seen)
    in_layer = torch.stack(
        [n_reached[[i for i, name in enumerate(layers) if name == layer]].any(0) for layer in sorted(set(layers))]
    )
    layer_share = in_layer.double().mean(0)
    features = []
    for k in ((layer_share >= MIN_LAYER_SHARE) & (position_share >= MIN_POSITION_SHARE)).nonzero().flatten().tolist():
        whole = _describe_column(k, seen)
        shares = float(layer_share[k]), float(position_share[k])
        features.append(OutlierFeature(k, *shares, whole.extreme, whole.sides, whole.quartiles))
    return tuple(features)


def _hidden_states(inputs: Sequence[LayerInput], statistics: Mapping[str, InputStatistics]) -> list[str]:
    """Return the layers whose inputs count: of layers in one block that read the same input, the first."""
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


def _describe_column(k: int, seen: Sequence[InputStatistics]) -> OutlierColumn:
    """Describe a column over the inputs of one layer or of several."""
    n_above, n_below = (sum(int(getattr(s, name)[k]) for s in seen) for name in ("n_above", "n_below"))
    extremes = [float(limit[k]) for s in seen for limit in (s.maximum, s.minimum)]
    counts = [s.values.counts[k] for s in seen if s.values is not None and k in s.values.counts]
    return OutlierColumn(
        column=k,
        share=(n_above + n_below) / sum(s.n_tokens for s in seen),
        extreme=max(extremes, key=abs),
        sides=_TWO_SIDED if n_above and n_below else _POSITIVE if n_above else _NEGATIVE,
        quartiles=quartiles(torch.stack(counts).sum(0), seen[0].threshold) if counts else None,
    )
