"""The int8 Linear layer: each mode against the exact product, within what its roundings allow, and no further."""

from __future__ import annotations

import copy

import pytest
import torch

import int8convert
from int8convert.errors import FormatError
from int8convert.formats.format import Format
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
STORED = [3, 40, 41]


def weight_and_input(
    dtype: torch.dtype, n_in: int = 96, n_out: int = 80, n_tokens: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, a bias, and tokens with outliers in the columns `STORED`, and at one token in column 70."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(n_out, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator)
    x = torch.randn(n_tokens, n_in, generator=generator).clamp(-4, 4)
    x[:, STORED] *= 20
    x[0, STORED] = torch.tensor([50.0, -60.0, 70.0])
    x[4, 70] = -9.0
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


def layer_for(mode: OutlierMode, dtype: torch.dtype) -> Int8Linear:
    weight, bias, _ = weight_and_input(dtype)
    layer = Int8Linear.from_float(weight, bias, mode=mode)
    if mode.uses_stored:
        layer.set_outliers(torch.tensor(STORED), weight[:, STORED])
    return layer


def outlier_columns(mode: OutlierMode) -> tuple[list[int], list[int]]:
    """Those with 16-bit weights, and those with weights out of their codes."""
    return {
        OutlierMode.STATIC: (STORED, []),
        OutlierMode.STATIC_GUARD: (STORED, [70]),
        OutlierMode.DYNAMIC: ([], [*STORED, 70]),
        OutlierMode.NONE: ([], []),
        OutlierMode.STATIC_BLOCKS: (STORED, []),
        OutlierMode.DYNAMIC_BLOCKS: ([], [*STORED, 70]),
        OutlierMode.BLOCKS: ([], []),
    }[mode]


def rounding_bound(mode: OutlierMode, dtype: torch.dtype) -> torch.Tensor:
    """The largest |y - exact| that half a step for each code and the last rounding allow, [tokens, out]."""
    weight, bias, x = (t.double() for t in weight_and_input(dtype))
    exact_columns, found_columns = outlier_columns(mode)
    x_left = x.clone()
    x_left[:, exact_columns + found_columns] = 0
    w_step = weight.abs().amax(1) / 127
    x_step = x_left.abs().amax(1) / 127
    n_left = x.shape[1] - len(exact_columns) - len(found_columns)
    w_left = weight.clone()
    w_left[:, exact_columns + found_columns] = 0
    bound = x_left.abs().sum(1)[:, None] * w_step / 2 + x_step[:, None] / 2 * w_left.abs().sum(1)
    bound += n_left * x_step[:, None] * w_step / 4 + x[:, found_columns].abs().sum(1)[:, None] * w_step / 2
    exact = x @ weight.t() + bias
    terms = x.abs() @ weight.abs().t() + bias.abs()
    return bound + torch.finfo(dtype).eps * (exact.abs() + bound) + 110 * torch.finfo(torch.float32).eps * terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", OutlierMode)
def test_every_mode_is_within_its_roundings(mode: OutlierMode, dtype: torch.dtype) -> None:
    weight, bias, x = weight_and_input(dtype)
    y = layer_for(mode, dtype)(x)
    assert y.dtype == dtype
    error = (y.double() - (x.double() @ weight.double().t() + bias.double())).abs()
    assert bool((error <= rounding_bound(mode, dtype)).all())


def test_every_mode_that_keeps_more_is_nearer() -> None:
    weight, bias, x = weight_and_input(torch.float32)
    exact = x.double() @ weight.double().t() + bias.double()
    none, dynamic, guard = (
        float((layer_for(mode, torch.float32)(x).double() - exact).norm())
        for mode in (OutlierMode.NONE, OutlierMode.DYNAMIC, OutlierMode.STATIC_GUARD)
    )
    assert guard < dynamic / 3 < none / 7


@pytest.mark.parametrize("mode", [OutlierMode.STATIC_GUARD, OutlierMode.DYNAMIC])
def test_outlier_columns_are_neither_dropped_nor_counted_twice(mode: OutlierMode) -> None:
    """With zeros everywhere else, the outlier terms are all there is, and they are exact."""
    layer = layer_for(mode, torch.float32)
    weight, _, x = weight_and_input(torch.float32)
    columns = [*STORED, 70]
    only = torch.zeros_like(x)
    only[:, columns] = torch.where(x[:, columns].abs() < 6, 6.0, x[:, columns])
    kept = weight.clone() if mode.uses_stored else layer.dequantize()
    kept[:, 70] = layer.dequantize()[:, 70]
    torch.testing.assert_close(layer(only), only @ kept.t() + layer.bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "without"),
    [
        (OutlierMode.STATIC_BLOCKS, OutlierMode.STATIC),
        (OutlierMode.DYNAMIC_BLOCKS, OutlierMode.DYNAMIC),
        (OutlierMode.BLOCKS, OutlierMode.NONE),
    ],
)
def test_blocks_confine_a_large_input_to_its_own_columns(mode: OutlierMode, without: OutlierMode) -> None:
    """A value below the threshold, but far above the rest: with one scale, the whole token is rounded by its step."""
    weight, bias, x = weight_and_input(torch.float32, n_in=300)
    x = x.clamp(-1, 1) / 16
    x[:, 290] = 5.0
    columns = STORED if mode.uses_stored else []
    exact = x.double() @ weight.double().t() + bias.double()
    errors = []
    for each in (mode, without):
        layer = Int8Linear.from_float(torch.eye(300), mode=each)
        layer.set_outliers(torch.tensor(columns, dtype=torch.int32), torch.eye(300)[:, columns])
        errors.append((layer(x) - x)[:, :256].double().norm())
    assert errors[0] < errors[1] / 20
    layer = Int8Linear.from_float(weight, bias, mode=mode)
    layer.set_outliers(torch.tensor(columns, dtype=torch.int32), weight[:, columns])
    plain = Int8Linear.from_float(weight, bias, mode=without)
    plain.set_outliers(layer.outlier_columns, layer.outlier_weight)
    assert (layer(x).double() - exact).norm() < (plain(x).double() - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [OutlierMode.STATIC, OutlierMode.STATIC_BLOCKS, OutlierMode.BLOCKS])
def test_a_token_of_a_static_layer_does_not_depend_on_its_neighbours(mode: OutlierMode, dtype: torch.dtype) -> None:
    layer = layer_for(mode, dtype)
    _, _, x = weight_and_input(dtype)
    alone = torch.cat([layer(token[None]) for token in x])
    assert torch.equal(alone, layer(x))


def test_hundreds_of_outlier_columns_all_stay_exact() -> None:
    """As in the input of a gated MLP's last layer; one of them rounded would cost all other columns precision."""
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear.from_float(torch.randn(64, 1000, generator=generator), mode=OutlierMode.DYNAMIC)
    x = torch.randn(20, 1000, generator=generator).clamp(-4, 4)
    x[:, 300:700] *= 20
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=0, atol=1.5)


def test_a_token_of_a_dynamic_layer_does_depend_on_them() -> None:
    layer = layer_for(OutlierMode.DYNAMIC, torch.float32)
    _, _, x = weight_and_input(torch.float32)
    assert not torch.equal(layer(x[1][None])[0], layer(x)[1])


def test_threshold_of_zero_finds_no_outliers() -> None:
    _, _, x = weight_and_input(torch.float32)
    layer = layer_for(OutlierMode.DYNAMIC, torch.float32)
    layer.threshold = 0.0
    assert torch.equal(layer(x), layer_for(OutlierMode.NONE, torch.float32)(x))


def test_no_finite_result_comes_of_an_input_that_is_not_finite() -> None:
    for mode in OutlierMode:
        for bad in (float("nan"), float("inf")):
            _, _, x = weight_and_input(torch.float32)
            x[2, 11] = bad
            y = layer_for(mode, torch.float32)(x)
            assert not bool(y[2].isfinite().any()), (mode, bad)
            is_alone = mode in (OutlierMode.STATIC, OutlierMode.STATIC_BLOCKS, OutlierMode.BLOCKS)
            assert not is_alone or bool(y[3].isfinite().all())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("n_tokens", [1, 7, 33])
def test_dynamic_is_bitsandbytes_where_both_pick_the_same_row_maxima(n_tokens: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight, bias, x = weight_and_input(torch.float16, n_tokens=max(7, n_tokens))
    x = x[:n_tokens]
    # An element of an outlier column that is below the threshold counts for the row maximum there, and not here.
    x[:, STORED] = torch.where(x[:, STORED].abs() < 6, 6.5, x[:, STORED])
    x[:, 70] = torch.where(x[:, 70].abs() < 6, x[:, 70].clamp(-0.1, 0.1), x[:, 70])
    theirs = bitsandbytes.nn.Linear8bitLt(96, 80, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": weight, "bias": bias})
    theirs = theirs.to("cpu").half().eval()
    theirs.weight = bitsandbytes.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False).to("cpu")
    y = layer_for(OutlierMode.DYNAMIC, torch.float16)(x)
    with torch.no_grad():
        expected = theirs(x)
    columns = [*STORED, 70] if bool((x[:, 70].abs() >= 6).any()) else STORED
    by_codes, kept = x.double().clone(), torch.zeros_like(x, dtype=torch.float64)
    by_codes[:, columns], kept[:, columns] = 0, x[:, columns].double()
    # 1.8e-5 by their constant for 1 / 127 / 127; an fp16 rounding of the dequantized weights of the outlier columns, of
    # each of the three terms, of their sums, and ours.
    sizes = (by_codes @ weight.double().t()).abs() + kept.abs() @ weight.double().abs().t() + bias.abs()
    bound = 1.8e-5 * (by_codes.abs() @ weight.double().abs().t()) + 6 * 2**-11 * sizes
    assert bool(((y.double() - expected.double()).abs() <= bound).all())


def test_weight_bytes_are_those_the_converter_writes() -> None:
    from cuda_kernels import reference

    weight, _, _ = weight_and_input(torch.float16)
    layer = layer_for(OutlierMode.NONE, torch.float16)
    expected = reference.row_quantize(weight.float().numpy())
    assert torch.equal(layer.weight, torch.from_numpy(expected.codes))
    assert torch.equal(layer.SCB, torch.from_numpy(expected.absmax))


def test_rounding_the_model_does_not_round_the_scales() -> None:
    layer = layer_for(OutlierMode.STATIC, torch.float32)
    absmax = layer.SCB.clone()
    for rounded in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16)):
        assert rounded.SCB.dtype == torch.float32 and torch.equal(rounded.SCB, absmax)
        assert rounded.bias.dtype == rounded.outlier_weight.dtype != torch.float32
        assert not rounded.SCB.requires_grad


def test_scales_of_both_layouts_give_the_same() -> None:
    _, bias, x = weight_and_input(torch.float32)
    layer = layer_for(OutlierMode.DYNAMIC, torch.float32)
    other = Int8Linear(96, 80, dtype=torch.float32, layout=Format.COMPRESSED_TENSORS)
    other.load_state_dict({"weight": layer.weight, "bias": bias, "weight_scale": (layer.SCB / 127)[:, None]})
    torch.testing.assert_close(other(x), layer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.dequantize(), layer.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", OutlierMode)
def test_gradient_of_the_input_is_that_of_the_dequantized_weight(mode: OutlierMode) -> None:
    layer = layer_for(mode, torch.float32)
    _, _, x = weight_and_input(torch.float32)
    x.requires_grad_()
    layer(x).square().sum().backward()
    expected = 2 * layer(x.detach()) @ layer.dequantize()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("shape", [(96,), (0, 96), (2, 3, 96), (2, 1, 3, 96)])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    layer = layer_for(OutlierMode.STATIC, torch.float32)
    x = torch.randn(shape)
    assert torch.equal(layer(x), layer(x.reshape(-1, 96)).reshape(*shape[:-1], 80))


def test_input_cast_to_the_dtype_of_the_weight_is_refused() -> None:
    with pytest.raises(FormatError, match=r"got an input of torch\.int8, expected a float"):
        layer_for(OutlierMode.NONE, torch.float32)(torch.ones(1, 96, dtype=torch.int8))


def test_layer_is_a_linear_layer_by_the_public_name() -> None:
    assert int8convert.Int8Linear is Int8Linear and issubclass(Int8Linear, torch.nn.Linear)
    assert "mode=static" in repr(layer_for(OutlierMode.STATIC, torch.float32))
