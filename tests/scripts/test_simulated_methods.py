"""The paper's methods against their definitions, number by number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from int8convert.runtime.linear import Int8Linear
from scripts.simulated_methods import (
    METHODS,
    Method,
    OutlierWeights,
    SimulatedLinear,
    compare_methods,
    quantize_absmax,
    quantize_zeropoint,
    simulating,
)
from tests.tools.outlier_models import gated_model, outlier_model

BY_NAME = {method.name: method for method in METHODS}
Matrix = list[list[Fraction]]


def rint(value: Fraction) -> int:
    """To the nearest whole number, ties to even; exact."""
    return round(value)


def groups(matrix: Matrix, by_row: bool) -> list[list[Fraction]]:
    return matrix if by_row else [list(itertools.chain(*matrix))] * len(matrix)


def slow_codes(matrix: Matrix, by_row: bool, is_zeropoint: bool) -> tuple[list[list[int]], list[Fraction]]:
    """The int8 codes of each row, zeropoint added back, and its scale: from the definitions, in exact fractions."""
    codes, scales = [], []
    for row, group in zip(matrix, groups(matrix, by_row), strict=True):
        if is_zeropoint:
            spread = max(group) - min(group)
            scale = Fraction(254) / spread if spread else Fraction(1)
            zeropoint = rint(scale * min(group)) + 127
            stored = [rint(scale * v) - zeropoint for v in row]
            assert not spread or all(-127 <= code <= 127 for code in stored)  # they fit into int8
            codes.append([code + zeropoint for code in stored])
        else:
            largest = max(map(abs, group))
            scale = 127 / largest if largest else Fraction(1)
            codes.append([rint(scale * v) for v in row])
            assert all(-127 <= code <= 127 for code in codes[-1])
        scales.append(scale)
    return codes, scales


def slow_linear(x: Matrix, weight: Matrix, bias: list[Fraction], method: Method, threshold: int) -> list[list[float]]:
    """y = x @ weight.T + bias by a method, one product after the other."""
    n_in = len(weight[0])
    w_codes, w_scales = slow_codes(weight, method.weight_by_row, method.is_zeropoint)
    outliers = []
    if method.outlier_weights != OutlierWeights.NONE:
        outliers = [k for k in range(n_in) if any(abs(token[k]) >= threshold for token in x)]
    rest = [[Fraction(0) if k in outliers else v for k, v in enumerate(token)] for token in x]
    x_codes, x_scales = slow_codes(rest, method.x_by_token, method.is_zeropoint)
    y = []
    for t, token in enumerate(x):
        row = []
        for n in range(len(weight)):
            total = sum(a * b for a, b in zip(x_codes[t], w_codes[n], strict=True)) / (x_scales[t] * w_scales[n])
            for k in outliers:
                is_stored = method.outlier_weights == OutlierWeights.STORED
                total += token[k] * (weight[n][k] if is_stored else w_codes[n][k] / w_scales[n])
            row.append(float(total + bias[n]))
        y.append(row)
    return y


def exact(values: torch.Tensor) -> Matrix:
    return [[Fraction(v) for v in row] for row in values.double().tolist()]


def problem(seed: int, one_sided: bool) -> tuple[torch.Tensor, nn.Linear]:
    """Tokens [5, 9] with outliers in columns 2 and 6, and a Linear of 7 outputs whose third row is zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 9, generator=generator).double()
    x[:, 2] = 20 + x[:, 2]
    x[3, 6] = -6.0
    x[4] = 0.0
    linear = nn.Linear(9, 7).double()
    linear.weight.data = torch.randn(7, 9, generator=generator).double() + (3.0 if one_sided else 0.0)
    linear.weight.data[2] = 0
    linear.bias.data = torch.randn(7, generator=generator).double()
    return x, linear


@pytest.mark.parametrize("one_sided", [False, True], ids=["centred", "one-sided"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_is_its_definition(method: Method, one_sided: bool) -> None:
    for seed in range(3):
        x, linear = problem(seed, one_sided)
        y = SimulatedLinear(linear, method)(x)
        expected = slow_linear(exact(x), exact(linear.weight), exact(linear.bias[None])[0], method, 6)
        torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_methods_are_the_nine_rows_and_all_different() -> None:
    x, linear = problem(0, one_sided=True)
    outputs = [SimulatedLinear(linear, method)(x) for method in METHODS]
    assert len(METHODS) == 9
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_what_shares_a_scale_is_what_the_name_says() -> None:
    """A row a hundred times as large ruins the others under one scale, and nothing under a scale for each."""
    v = torch.cat((torch.rand(3, 50), 100 * torch.rand(1, 50))).double()
    for quantize in (quantize_absmax, quantize_zeropoint):
        alone, together = quantize(v, True), quantize(v, False)
        assert (alone.dequantize() - v)[:3].abs().max() < 0.005 < 0.1 < (together.dequantize() - v)[:3].abs().max()
        assert alone.scale.shape == (4, 1) and together.scale.shape == (1, 1)


def test_zeropoint_has_steps_half_as_large_for_numbers_of_one_sign() -> None:
    v = torch.rand(1, 1000).double()
    absmax, zeropoint = ((q(v, False).dequantize() - v).abs().max() for q in (quantize_absmax, quantize_zeropoint))
    assert float(zeropoint) == pytest.approx(float(absmax) / 2, rel=0.02)


def test_ties_go_to_even() -> None:
    assert quantize_absmax(torch.tensor([[127.0, 0.5, 1.5, -2.5]]).double(), True).values.tolist() == [[127, 0, 2, -2]]


def test_llm_int8_is_what_the_runtime_computes() -> None:
    """Two codes apart at most: the runtime multiplies by a reciprocal in float32."""
    x, linear = problem(1, one_sided=False)
    layer = Int8Linear.from_float(linear.weight.detach().float(), linear.bias.detach().float())
    y = SimulatedLinear(linear, BY_NAME["LLM.int8(), int8 outlier weights"])(x)
    torch.testing.assert_close(layer(x.float()).double(), y, rtol=1e-4, atol=1e-4)


def test_nan_makes_its_column_an_outlier() -> None:
    x, linear = problem(0, one_sided=False)
    x[0, 8] = float("nan")
    y = SimulatedLinear(linear, BY_NAME["LLM.int8(), stored 16-bit columns"])(x)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("method", [BY_NAME["absmax"], BY_NAME["LLM.int8(), stored 16-bit columns"]])
def test_conv1d_is_the_linear_it_stands_for(method: Method) -> None:
    x, linear = problem(0, one_sided=False)
    conv = Conv1D(7, 9).double()
    conv.weight.data, conv.bias.data = linear.weight.data.t().contiguous(), linear.bias.data
    assert torch.equal(SimulatedLinear(conv, method)(x), SimulatedLinear(linear, method)(x))


def test_dtype_and_shape_are_those_of_the_input() -> None:
    _, linear = problem(0, one_sided=False)
    y = SimulatedLinear(linear.half(), METHODS[0])(torch.randn(2, 3, 9).half())
    assert y.dtype == torch.float16 and y.shape == (2, 3, 7)


class Difference:
    """Mean squared difference of the log probabilities."""

    def __init__(self) -> None:
        self.total, self.n = 0.0, 0
        self.targets: list[int] = []

    def add(self, log_probs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        self.total += float((log_probs - reference).square().mean(-1).sum())
        self.n += len(targets)
        self.targets += targets.tolist()


def test_simulated_layers_are_those_llm_int8_quantizes_and_go_again(tokenizer: Any) -> None:
    model = outlier_model(tokenizer)
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="on purpose"), simulating(model, METHODS[0]):
        simulated = {name for name, module in model.named_modules() if isinstance(module, SimulatedLinear)}
        raise RuntimeError("on purpose")
    assert len(simulated) == 12 and "lm_head" not in simulated
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("make", [outlier_model, gated_model])
def test_comparison_runs_every_method_against_the_model_itself(make: Callable[[Any], Any], tokenizer: Any) -> None:
    model = make(tokenizer)
    windows = torch.arange(3, 63).view(3, 20)
    rows = compare_methods(model, windows, Difference)
    assert list(rows) == ["reference", *(method.name for method in METHODS)]
    assert rows["reference"].total == 0
    assert all(row.n == 57 and row.targets == windows[:, 1:].flatten().tolist() for row in rows.values())
    # The two ends of the table: without decomposition the outliers take the other features' steps.
    assert (
        rows["absmax"].total > rows["absmax vector-wise"].total > 20 * rows["LLM.int8(), stored 16-bit columns"].total
    )
    name = "absmax row-wise"
    expected = Difference()
    with torch.no_grad():
        reference = [model(ids[None]).logits[0, :-1].log_softmax(-1) for ids in windows]
        with simulating(model, BY_NAME[name]):
            for ids, of_model in zip(windows, reference, strict=True):
                expected.add(model(ids[None]).logits[0, :-1].log_softmax(-1), of_model, ids[1:])
    assert rows[name].total == expected.total > 0


def test_one_scale_for_all_weights_is_enough_for_one_injection_only(tokenizer: Any) -> None:
    """The rows of `up_proj` differ by the factor of the second injection. One scale for all is that of the largest."""
    names = ("absmax row-wise + decomposition", "LLM.int8(), stored 16-bit columns")
    ratios = []
    for make in (outlier_model, gated_model):
        rows = compare_methods(make(tokenizer), torch.arange(3, 63).view(3, 20), Difference)
        one, each = (rows[name].total for name in names)
        ratios.append(one / each)
    assert ratios[0] < 2 and ratios[1] > 100


def test_threshold_decides_what_is_decomposed(tokenizer: Any) -> None:
    model = outlier_model(tokenizer)
    method = BY_NAME["LLM.int8(), stored 16-bit columns"]
    found = {
        threshold: compare_methods(
            model, torch.arange(3, 43).view(2, 20), Difference, methods=[method], threshold=threshold
        )
        for threshold in (0.0, 6.0, 1e9)
    }
    errors = [rows[method.name].total for rows in found.values()]
    assert errors[0] < 1e-8 < errors[1] < errors[2]  # at 0 every column is an outlier, at 1e9 none
