"""Which columns are stored: the frequent outliers always, others by what they take away for their bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from int8convert.calibration.statistics import InputStatistics, watching
from int8convert.calibration.weight_squares import WeightSquares, weight_squares
from int8convert.outliers.choice import choose_columns, removed_error
from int8convert.runtime.linear import Int8Linear

N_IN = 24


def layer(n_out: int = 16, seed: int = 0, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(N_IN, n_out)
    linear.weight.data = torch.randn(n_out, N_IN) * scale
    return linear


def tokens(seed: int = 0, n: int = 200) -> torch.Tensor:
    """Columns of all magnitudes, none an outlier."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, N_IN, generator=generator).clamp(-3, 3) * torch.linspace(0.1, 1.5, N_IN)


def gather(layers: dict[str, nn.Module], x: torch.Tensor, threshold: float = 6.0) -> dict[str, InputStatistics]:
    with torch.no_grad(), watching(layers, threshold) as statistics:
        for module in layers.values():
            module(x)
    return statistics


def squares(layers: dict[str, nn.Module]) -> dict[str, WeightSquares]:
    return {name: weight_squares(module) for name, module in layers.items()}


def chosen(layers: dict[str, nn.Module], x: torch.Tensor, **options: float) -> dict[str, list[int]]:
    return {
        name: found.tolist() for name, found in choose_columns(squares(layers), gather(layers, x), **options).items()
    }


def test_columns_that_are_outliers_often_enough_are_stored() -> None:
    x = tokens(n=100)
    x[:, 3] = 7.0
    x[:6, 5] = -6.0
    x[:5, 9] = 50.0
    x[:, 11] = 5.99
    layers = {"a": layer()}
    assert chosen(layers, x, budget=0) == {"a": [3, 5]}
    assert chosen(layers, x, budget=0, min_share=0) == {"a": [3, 5, 9]}
    assert chosen(layers, x, budget=0, min_share=1) == {"a": [3]}


def test_no_column_is_stored_of_a_quiet_layer_without_budget() -> None:
    assert chosen({"a": layer()}, tokens(), budget=0, min_share=0) == {"a": []}


def test_budget_is_never_exceeded_and_what_it_buys_is_best_for_its_bytes() -> None:
    layers = {"wide": layer(64, 1), "narrow": layer(8, 2), "loud": layer(16, 3, scale=5.0)}
    statistics = gather(layers, tokens())
    int8_bytes = sum(module.weight.numel() for module in layers.values())
    value = {
        (name, k): float(error) / (2 * module.out_features)
        for name, module in layers.items()
        for k, error in enumerate(removed_error(weight_squares(module), statistics[name]))
    }
    for budget in (0.01, 0.03, 0.1, 0.4):
        found = choose_columns(squares(layers), statistics, budget=budget)
        bought = {(name, k) for name, columns in found.items() for k in columns.tolist()}
        spent = sum(2 * layers[name].out_features for name, _ in bought)
        assert spent <= budget * int8_bytes
        rest = value.keys() - bought
        assert not bought or min(value[key] for key in bought) >= max(value[key] for key in rest)
        best = max(rest, key=lambda key: value[key])
        assert spent + 2 * layers[best[0]].out_features > budget * int8_bytes


def test_frequent_columns_are_not_paid_from_the_budget() -> None:
    x = tokens()
    x[:, 3] = 7.0
    one = 2 * 16 / (16 * N_IN)
    assert len(chosen({"a": layer()}, x, budget=one)["a"]) == 2


def test_budget_is_for_the_layers_named() -> None:
    layers = {"a": layer(seed=1), "b": layer(seed=2)}
    statistics = gather(layers, tokens())
    found = choose_columns(squares(layers), statistics, budget=0.2, budgeted=["b"])
    assert found["a"].tolist() == [] and 1 <= len(found["b"]) <= 0.2 * N_IN / 2


def quantized(v: torch.Tensor) -> torch.Tensor:
    step = v.abs().amax(1, keepdim=True) / 127
    return (v / step).round() * step


def test_error_that_is_said_to_go_is_the_error_that_goes() -> None:
    """Against the squared error of the very product, with and without each column.

    To a fifth: the rounding of some hundred weights is no average, and the largest of a row is not rounded at all.
    """
    linear, x = layer(200), tokens(n=4000)
    statistics = gather({"a": linear}, x)["a"]
    removed = removed_error(weight_squares(linear), statistics) * statistics.output_variance / 12
    weight = linear.weight.detach()
    w8, x8 = quantized(weight), quantized(x)
    with_all = (x8 @ w8.t() - x @ weight.t()).square().sum(1).mean()
    for k in (0, 8, 16, 23):
        y = x8 @ w8.t() - x8[:, k : k + 1] * w8[:, k] + x[:, k : k + 1] * weight[:, k]
        without = (y - x @ weight.t()).square().sum(1).mean()
        assert float(with_all - without) == pytest.approx(float(removed[k]), rel=0.2)


def test_int8_and_float_layers_are_judged_alike() -> None:
    linear = layer(32)
    int8 = Int8Linear.from_float(linear.weight.detach(), linear.bias.detach())
    errors = [removed_error(weight_squares(module), gather({"a": module}, tokens())["a"]) for module in (linear, int8)]
    torch.testing.assert_close(errors[0], errors[1], rtol=0.03, atol=0)


def test_layers_that_saw_nothing_or_no_numbers_get_no_column_of_the_budget() -> None:
    layers = {"a": layer(), "b": layer()}
    statistics = gather({"a": layers["a"]}, tokens()) | gather({"b": layers["b"]}, tokens()[:0])
    found = choose_columns(squares(layers), statistics, budget=10.0)
    assert len(found["a"]) == N_IN and found["b"].tolist() == []
    x = tokens()
    x[:20, 4] = math.nan
    assert chosen({"a": layer()}, x, budget=10.0) == {"a": [4]}


def test_layers_whose_weights_are_on_the_disk_keep_their_frequent_columns() -> None:
    x = tokens()
    x[:, 3] = 7.0
    linear = layer()
    statistics = gather({"a": linear}, x)
    found = choose_columns(squares({"a": linear.to("meta")}), statistics, budget=10.0)
    assert found["a"].tolist() == [3]


def test_the_same_text_gives_the_same_set() -> None:
    layers = {name: layer() for name in "abc"}  # equal in everything
    found = [chosen(layers, tokens(), budget=0.1) for _ in range(2)]
    assert found[0] == found[1] and len(found[0]["a"]) >= len(found[0]["c"])


@pytest.mark.parametrize("n_parts", [1, 3])
def test_statistics_are_those_of_all_tokens(n_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("int8convert.calibration.statistics._ELEMENTS_AT_A_TIME", 40 * N_IN)
    linear, x = layer(), tokens()
    x[:30, 2], x[30:40, 2] = 8.0, -9.0
    with torch.no_grad(), watching({"a": linear}, 6.0) as statistics:
        for part in x.chunk(n_parts):
            linear(part[None])
    seen, y = statistics["a"], linear(x).detach().double()
    assert seen.n_tokens == 200
    assert torch.equal(seen.maximum, x.amax(0)) and torch.equal(seen.minimum, x.amin(0))
    assert torch.equal(seen.largest, x.abs().amax(0))
    assert (int(seen.n_above[2]), int(seen.n_below[2])) == (30, 10) and float(seen.share[2]) == 0.2
    assert int(seen.n_above.sum() + seen.n_below.sum()) == 40
    torch.testing.assert_close(seen.sum_squares, x.double().square().sum(0))
    assert seen.output_variance == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-6)


def test_step_is_that_of_a_token_without_its_outlier_columns() -> None:
    linear, x = layer(), tokens()
    x[:, 2] = 100.0
    rest = x[:, [k for k in range(N_IN) if k != 2]]
    seen = gather({"a": linear}, x)["a"]
    assert float(seen.step_squares) == pytest.approx(
        float((rest.abs().amax(1) / 127).double().square().sum()), rel=1e-6
    )


def test_hooks_go_even_after_an_error() -> None:
    linear = layer()
    with pytest.raises(RuntimeError), watching({"a": linear}, 6.0):
        linear(torch.zeros(3, 5))
    assert not linear._forward_hooks


def test_inputs_by_keyword_and_in_16_bits_are_counted() -> None:
    linear, x = layer().to(torch.bfloat16), tokens().to(torch.bfloat16)
    with torch.no_grad(), watching({"a": linear}, 6.0) as statistics:
        linear(input=x)
    assert torch.equal(statistics["a"].largest, x.abs().amax(0).float())


def test_input_that_was_changed_in_place_is_another_input() -> None:
    layers, x = {name: layer() for name in "abc"}, tokens()
    with torch.no_grad(), watching(layers, 6.0) as statistics:
        layers["a"](x)
        layers["b"](x)
        layers["c"](x.mul_(2))
    assert torch.equal(statistics["a"].largest, statistics["b"].largest)
    assert torch.equal(statistics["c"].largest, 2 * statistics["a"].largest)
