"""The CPU kernel against the reference, the reference against torch and bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cuda_kernels import cpu, reference

SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025]
TORCH_DTYPE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def quantize(weight: torch.Tensor) -> reference.QuantizedRows:
    """The kernel's result on a tensor, into arrays prefilled with what it never writes."""
    name = next(n for n, dtype in TORCH_DTYPE.items() if dtype == weight.dtype)
    integer = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    bits = weight.contiguous().view(integer).numpy().view(cpu.BITS_DTYPE[name])
    rows, columns = weight.shape
    codes = np.full((rows, columns), -128, np.int8)
    absmax, signal, noise = (np.full(rows, np.nan, dtype) for dtype in (np.float32, np.float64, np.float64))
    cpu.row_quantize(bits, codes, absmax, signal, noise)
    return reference.QuantizedRows(codes, absmax, signal, noise)


def assert_same(weight: torch.Tensor) -> None:
    found, expected = quantize(weight), reference.row_quantize(weight.float().numpy())
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    # Within a row the kernel adds n products in float32: relative error under n * 2^-24, and every term is positive.
    bound = weight.shape[1] * 2.0**-24 + 2.0**-22
    np.testing.assert_allclose(found.signal, expected.signal, rtol=bound)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=bound, atol=1e-6 * weight.shape[1])


@pytest.mark.parametrize("dtype", TORCH_DTYPE.values())
@pytest.mark.parametrize("columns", SIZES)
def test_kernel_equals_reference_at_every_size(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for rows in (1, 7):
        assert_same((torch.randn(rows, columns, generator=generator) * 0.05).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_is_read_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    for chunk in finite.split(1021):
        assert_same(chunk[None])


def test_reference_equals_bitsandbytes_cpu_op() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for dtype in TORCH_DTYPE.values():
        weight = (torch.randn(333, 517, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
        codes, absmax, _ = functional.int8_vectorwise_quant(weight)
        expected = reference.row_quantize(weight.float().numpy())
        np.testing.assert_array_equal(codes.numpy(), expected.codes)
        np.testing.assert_array_equal(absmax.numpy(), expected.absmax)


def test_true_division_would_move_codes() -> None:
    """The rounding rule is not a matter of taste: dividing by the scale gives other codes somewhere."""
    weight = torch.randn(2000, 512, generator=torch.Generator().manual_seed(2)).half().float().numpy()
    absmax = np.abs(weight).max(axis=1, keepdims=True)
    divided = np.rint(weight * (np.float32(127) / absmax))
    moved = (divided != reference.row_quantize(weight).codes).mean()
    assert 0 < moved < 1e-3


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    np.testing.assert_array_equal(quantize(weight).codes, [[127, 0, 2, 2, 0, -2, -2]])


def test_zero_row_gets_zero_codes() -> None:
    found = quantize(torch.tensor([[0.0, -0.0], [0.0, 1.0]], dtype=torch.float16))
    np.testing.assert_array_equal(found.codes, [[0, 0], [0, 127]])
    np.testing.assert_array_equal(found.absmax, [0.0, 1.0])


def test_row_too_small_for_a_finite_scale_gets_zero_codes() -> None:
    """1 / absmax overflows below 2^-128: bitsandbytes then writes garbage, we write zeros and the true absmax."""
    tiny = torch.tensor([[1e-40, -1e-39]], dtype=torch.float32)
    np.testing.assert_array_equal(quantize(tiny).codes, [[0, 0]])
    assert quantize(tiny).absmax[0] == np.float32(1e-39)
    assert_same(tiny)


@pytest.mark.parametrize("dtype", TORCH_DTYPE.values())
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_non_finite_values_show_in_absmax(dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(3, 70, dtype=dtype)
    weight[1, 69] = bad
    np.testing.assert_array_equal(np.isfinite(quantize(weight).absmax), [True, False, True])


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 80)), elements=st.floats(-1e4, 1e4, width=32))
)
def test_round_trip_error_is_at_most_half_a_step(weight: np.ndarray) -> None:
    found = quantize(torch.from_numpy(weight))
    scale = found.absmax[:, None].astype(np.float64) / reference.N_STEPS
    error = np.abs(weight - found.codes * scale)
    # Half a step, and the three float32 roundings on the way to the code, each 2^-24 of at most 127 steps.
    assert np.all(error <= scale * (0.5 + 3 * 127 * 2.0**-24) + 1.2e-38)


@given(st.permutations(range(9)))
def test_permuting_rows_permutes_results(order: list[int]) -> None:
    weight = torch.randn(9, 65, generator=torch.Generator().manual_seed(3)).half()
    straight, permuted = quantize(weight), quantize(weight[list(order)])
    for a, b in zip(straight, permuted, strict=True):
        np.testing.assert_array_equal(a[list(order)], b)


def test_largest_magnitude_of_every_row_has_code_127() -> None:
    found = quantize(torch.randn(200, 33, generator=torch.Generator().manual_seed(4)).bfloat16())
    assert (np.abs(found.codes).max(axis=1) == reference.N_STEPS).all()
