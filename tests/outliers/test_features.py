"""The paper's criteria on layers whose inputs are known to the last value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from int8convert.calibration.statistics import MAX_COLUMNS, OutlierValues, quartiles, watching
from int8convert.outliers.features import (
    LayerInput,
    OutlierFeature,
    describe_inputs,
    find_features,
    layer_of,
)

WIDTH = 8
N_TOKENS = 20


class Stack(nn.Module):
    """Layers that read given inputs: `layers.0.q` and `layers.0.k` the same one, `layers.0.fc2` a wider one."""

    def __init__(self, n_layers: int, wide: int = 2 * WIDTH) -> None:
        super().__init__()
        modules = (
            {"q": nn.Linear(WIDTH, 4), "k": nn.Linear(WIDTH, 4), "fc2": nn.Linear(wide, 4)} for _ in range(n_layers)
        )
        self.layers = nn.ModuleList(nn.ModuleDict(names) for names in modules)

    def run(self, x: torch.Tensor, wide: torch.Tensor) -> None:
        """x [layers, tokens, WIDTH], wide [layers, tokens, wide]."""
        for layer, own, own_wide in zip(self.layers, x, wide, strict=True):
            layer["q"](own)
            layer["k"](own)
            layer["fc2"](own_wide)


def observe(
    x: torch.Tensor, wide: torch.Tensor | None = None, n_batches: int = 1, threshold: float = 6.0
) -> tuple[tuple[LayerInput, ...], tuple[OutlierFeature, ...]]:
    n_layers, n_tokens, _ = x.shape
    wide = torch.zeros(n_layers, n_tokens, 2 * WIDTH) if wide is None else wide
    model = Stack(n_layers, wide.shape[2])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad(), watching(layers, threshold, with_values=True) as statistics:
        for part, wide_part in zip(x.chunk(n_batches, 1), wide.chunk(n_batches, 1), strict=True):
            model.run(part, wide_part)
    inputs = describe_inputs(statistics, WIDTH)
    return inputs, find_features(inputs, statistics)


def quiet(n_layers: int = 8) -> torch.Tensor:
    """Values below any threshold, all different, so that no two inputs are the same."""
    return torch.rand(n_layers, N_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) * 5


def test_features_are_those_of_enough_layers_and_enough_positions() -> None:
    x = quiet()
    x[:2, :, 1] = 10.0  # 2 of 8 layers, 25 % of all positions
    x[:1, :, 2] = 10.0  # 1 of 8 layers
    x[:, :1, 3] = 10.0  # 5 % of the positions
    x[:, :2, 4] = 10.0  # 10 % of the positions
    x[:, :, 5] = 5.99
    x[:, :, 6] = -6.0
    x[0, :10, 7], x[1, 10:, 7] = 10.0, 10.0  # half of two layers: 12.5 % of all positions
    _, features = observe(x)
    assert [(f.column, f.layer_share, f.position_share) for f in features] == [
        (1, 0.25, 0.25),
        (4, 1.0, 0.1),
        (6, 1.0, 1.0),
        (7, 0.25, 0.125),
    ]


def test_exactly_six_percent_of_the_positions_is_enough() -> None:
    x = torch.rand(1, 50, WIDTH)
    x[0, :3, 1], x[0, :2, 2] = 8.0, 8.0
    _, features = observe(x)
    assert [feature.column for feature in features] == [1]


def test_no_outliers_are_found_where_there_are_none() -> None:
    inputs, features = observe(quiet())
    assert features == () and all(entry.columns == () for entry in inputs)
    assert inputs[0].extreme == pytest.approx(float(quiet()[0].max()))


def test_second_matrix_of_the_feed_forward_block_is_reported_and_counts_for_no_feature() -> None:
    wide = torch.zeros(8, N_TOKENS, 2 * WIDTH)
    wide[:, :, 3] = 50.0
    inputs, features = observe(quiet(), wide)
    assert features == ()
    of_fc2 = [entry for entry in inputs if entry.projection == "fc2"]
    assert [column.column for column in of_fc2[0].columns] == [3] and not of_fc2[0].is_hidden_state
    assert of_fc2[0].layer == "layers.0" and of_fc2[0].module_name == "layers.0.fc2"


def test_layers_that_read_the_same_count_once() -> None:
    """With q and k counted twice, fc2, here as wide as the hidden state, would weigh a third instead of a half."""
    x = quiet(4)
    x[:, :, 1] = 9.0
    _, features = observe(x, quiet(4) / 2)
    assert [(f.column, f.position_share) for f in features] == [(1, 0.5)]


def test_sides_tell_one_sign_from_two() -> None:
    x = quiet(1)
    x[0, :, 1], x[0, :, 2] = 8.0, -8.0
    x[0, ::2, 3], x[0, 1::2, 3] = 8.0, -9.0
    x[0, :, 4] = 8.0
    x[0, 0, 4] = -5.9  # below the threshold: no second side
    _, features = observe(x)
    assert {f.column: f.sides for f in features} == {1: "positive", 2: "negative", 3: "two-sided", 4: "positive"}
    assert {f.column: f.extreme for f in features} == {1: 8.0, 2: -8.0, 3: -9.0, 4: 8.0}


def test_share_of_a_column_is_that_of_its_tokens() -> None:
    x = quiet(1)
    x[0, :7, 5] = -6.5
    inputs, _ = observe(x)
    (column,) = inputs[0].columns
    assert (column.column, column.share, column.extreme) == (5, 7 / 20, -6.5)


def test_batches_change_nothing() -> None:
    x = torch.randn(3, N_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)) * 5
    assert observe(x) == observe(x, n_batches=4)


@pytest.mark.parametrize("signs", ["positive", "negative", "both"])
def test_quartiles_are_those_of_the_values_that_reach_the_threshold(signs: str) -> None:
    random = np.random.default_rng(0)
    values = random.lognormal(2.0, 1.0, 4000).astype(np.float32) * {"positive": 1, "negative": -1, "both": 1}[signs]
    if signs == "both":
        values *= random.choice([-1, 1], 4000, p=[0.3, 0.7])
    found = OutlierValues(6.0)
    for part in np.array_split(values, 7):
        found.add(torch.from_numpy(part)[:, None])
    expected = np.quantile(values[np.abs(values) >= 6.0], [0.25, 0.5, 0.75], method="inverted_cdf")
    assert quartiles(found.counts[0], 6.0) == pytest.approx(expected, rel=2 ** (1 / 32) - 1 + 1e-6)


def test_values_past_the_last_bin_and_nan_do_no_harm() -> None:
    found = OutlierValues(6.0)
    found.add(torch.tensor([[1e30], [math.inf], [math.nan], [1.0]]))
    assert int(found.counts[0].sum()) == 2 and quartiles(found.counts[0], 6.0)[1] > 20_000


def test_only_so_many_columns_have_quartiles_those_with_most_outliers_first() -> None:
    x = torch.zeros(4, MAX_COLUMNS + 2)
    x[0] = 7.0
    x[1, -1] = 7.0  # the last one twice
    found = OutlierValues(6.0)
    found.add(x)
    assert len(found.counts) == MAX_COLUMNS
    assert MAX_COLUMNS + 1 in found.counts and MAX_COLUMNS not in found.counts
    found.add(x)
    assert len(found.counts) == MAX_COLUMNS and int(found.counts[0].sum()) == 2


def test_nan_counts_as_infinitely_large() -> None:
    x = quiet(1)
    x[0, :2, 5] = math.nan
    inputs, features = observe(x)
    (column,) = inputs[0].columns
    assert (column.column, column.share, column.extreme) == (5, 0.1, math.inf)
    assert column.quartiles is None and features[0].column == 5


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.decoder.layers.3.self_attn.q_proj", "model.decoder.layers.3"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("model.layers.10.mlp.experts.7.up_proj", "model.layers.10"),
        ("h.2.attn.c_attn", "h.2"),
        ("lm_head", ""),
        ("layers2.proj", ""),
    ],
)
def test_layer_of_a_module_is_its_block(name: str, layer: str) -> None:
    assert layer_of(name) == layer
