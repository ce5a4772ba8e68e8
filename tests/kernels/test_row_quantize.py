"""Every backend's rows against the reference, the reference against torch and bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cuda_kernels import reference
from tests.kernels.backends import Backend, backends

SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025]
TORCH_DTYPE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

every_backend = pytest.mark.parametrize("backend", backends("row_quantize"))


def quantize(backend: Backend, weight: torch.Tensor) -> reference.QuantizedRows:
    """The backend's result on a tensor of any layout."""
    name = next(n for n, dtype in TORCH_DTYPE.items() if dtype == weight.dtype)
    integer = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    return backend.row_quantize(weight.view(integer).numpy().view(f"u{weight.element_size()}"), name)


def assert_same(backend: Backend, weight: torch.Tensor) -> None:
    found, expected = quantize(backend, weight), reference.row_quantize(weight.float().numpy())
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    # Within a row the kernel adds n products in float32: relative error under n * 2^-24, and every term is positive.
    bound = weight.shape[1] * 2.0**-24 + 2.0**-22
    np.testing.assert_allclose(found.signal, expected.signal, rtol=bound)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=bound, atol=1e-6 * weight.shape[1])


@every_backend
@pytest.mark.parametrize("dtype", TORCH_DTYPE.values())
@pytest.mark.parametrize("columns", SIZES)
def test_kernel_equals_reference_at_every_size(backend: Backend, dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for rows in (1, 7):
        assert_same(backend, (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_is_read_exactly(backend: Backend, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    for chunk in finite.split(1021):
        assert_same(backend, chunk[None])


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


@every_backend
def test_rows_that_lie_apart_are_read_where_they_are(backend: Backend) -> None:
    wide = torch.randn(9, 200, generator=torch.Generator().manual_seed(5)).half()
    wide[:, 65:] = float("nan")
    assert_same(backend, wide[:, :65])


@every_backend
def test_two_runs_agree_in_every_bit(backend: Backend) -> None:
    weight = torch.randn(17, 1025, generator=torch.Generator().manual_seed(6)).bfloat16()
    for first, second in zip(quantize(backend, weight), quantize(backend, weight), strict=True):
        np.testing.assert_array_equal(first, second)


@every_backend
def test_ties_go_to_even(backend: Backend) -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    np.testing.assert_array_equal(quantize(backend, weight).codes, [[127, 0, 2, 2, 0, -2, -2]])


@every_backend
def test_zero_row_gets_zero_codes(backend: Backend) -> None:
    found = quantize(backend, torch.tensor([[0.0, -0.0], [0.0, 1.0]], dtype=torch.float16))
    np.testing.assert_array_equal(found.codes, [[0, 0], [0, 127]])
    np.testing.assert_array_equal(found.absmax, [0.0, 1.0])


@every_backend
def test_row_too_small_for_a_finite_scale_gets_zero_codes(backend: Backend) -> None:
    """1 / absmax overflows below 2^-128: bitsandbytes then writes garbage, we write zeros and the true absmax."""
    tiny = torch.tensor([[1e-40, -1e-39]], dtype=torch.float32)
    np.testing.assert_array_equal(quantize(backend, tiny).codes, [[0, 0]])
    assert quantize(backend, tiny).absmax[0] == np.float32(1e-39)
    assert_same(backend, tiny)


@every_backend
@pytest.mark.parametrize("dtype", TORCH_DTYPE.values())
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_non_finite_values_show_in_absmax(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(3, 70, dtype=dtype)
    weight[1, 69] = bad
    np.testing.assert_array_equal(np.isfinite(quantize(backend, weight).absmax), [True, False, True])


@every_backend
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 80)), elements=st.floats(-1e4, 1e4, width=32))
)
def test_round_trip_error_is_at_most_half_a_step(backend: Backend, weight: np.ndarray) -> None:
    found = quantize(backend, torch.from_numpy(weight))
    scale = found.absmax[:, None].astype(np.float64) / reference.N_STEPS
    error = np.abs(weight - found.codes * scale)
    # Half a step, and the three float32 roundings on the way to the code, each 2^-24 of at most 127 steps.
    assert np.all(error <= scale * (0.5 + 3 * 127 * 2.0**-24) + 1.2e-38)


@every_backend
@given(st.permutations(range(9)))
def test_permuting_rows_permutes_results(backend: Backend, order: list[int]) -> None:
    weight = torch.randn(9, 65, generator=torch.Generator().manual_seed(3)).half()
    straight, permuted = quantize(backend, weight), quantize(backend, weight[list(order)])
    for a, b in zip(straight, permuted, strict=True):
        np.testing.assert_array_equal(a[list(order)], b)


@every_backend
def test_largest_magnitude_of_every_row_has_code_127(backend: Backend) -> None:
    found = quantize(backend, torch.randn(200, 33, generator=torch.Generator().manual_seed(4)).bfloat16())
    assert (np.abs(found.codes).max(axis=1) == reference.N_STEPS).all()
