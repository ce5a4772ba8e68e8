"""Every backend's row quantization against the reference, the reference against bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cuda_kernels import reference
from tests.kernels.backends import DTYPES, Backend, backends, narrow, widen
from tests.kernels.outputs import Bits

SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]

each_backend = pytest.mark.parametrize("backend", backends("row_quantize"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(rows: int, columns: int, dtype: str, seed: int = 0) -> Bits:
    """Random weights, all different."""
    return narrow(np.random.default_rng(seed + 7 * columns).standard_normal((rows, columns)) * 0.05, dtype)


def assert_same(backend: Backend, weight: Bits, dtype: str) -> None:
    found, expected = backend.row_quantize(weight, dtype), reference.row_quantize(widen(weight, dtype))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.absmax, expected.absmax)
    # Within a row the kernel adds n products in float32: relative error under n * 2^-24, and every term is positive.
    bound = weight.shape[1] * 2.0**-24 + 2.0**-22
    np.testing.assert_allclose(found.signal, expected.signal, rtol=bound)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=bound, atol=1e-6 * weight.shape[1])


@each_backend
@each_dtype
@pytest.mark.parametrize("columns", SIZES)
def test_kernel_equals_reference_at_every_size(backend: Backend, dtype: str, columns: int) -> None:
    for rows in (1, 9):
        assert_same(backend, normal(rows, columns, dtype), dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize(("columns", "step"), [(33, 40), (128, 129), (128, 136), (1032, 1040), (2304, 2305)])
def test_rows_that_lie_apart_are_read_where_they_are(backend: Backend, dtype: str, columns: int, step: int) -> None:
    assert_same(backend, normal(9, step, dtype)[:, :columns], dtype)


@each_backend
def test_matrix_without_values_has_no_codes(backend: Backend) -> None:
    assert backend.row_quantize(np.empty((0, 64), np.uint16), "F16").codes.shape == (0, 64)
    found = backend.row_quantize(np.empty((3, 0), np.uint16), "F16")
    for each in (found.absmax, found.signal, found.noise):
        np.testing.assert_array_equal(each, [0, 0, 0])


@each_backend
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("columns", [1021, 1024])
def test_every_16_bit_pattern_is_read_exactly(backend: Backend, dtype: str, columns: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[np.isfinite(widen(every, dtype))]
    finite = finite[: finite.size // columns * columns]
    # Sorted rows hold values of one magnitude, mixed ones lose the small.
    assert_same(backend, finite.reshape(-1, columns), dtype)
    assert_same(backend, np.ascontiguousarray(finite.reshape(columns, -1).T), dtype)


def test_reference_equals_bitsandbytes_cpu_op() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
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


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [1, 8])
def test_ties_go_to_even(backend: Backend, dtype: str, repeats: int) -> None:
    weight = narrow([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5] * repeats], dtype)
    codes = backend.row_quantize(weight, dtype).codes
    np.testing.assert_array_equal(codes, [[127, 0, 2, 2, 0, -2, -2] * repeats])


@each_backend
@each_dtype
@pytest.mark.parametrize("columns", [2, 64, 2048])
def test_zero_row_gets_zero_codes(backend: Backend, dtype: str, columns: int) -> None:
    weight = np.zeros((3, columns))
    weight[0, -1], weight[1, 0] = -0.0, 1
    found = backend.row_quantize(narrow(weight, dtype), dtype)
    np.testing.assert_array_equal(found.codes, 127 * weight)
    np.testing.assert_array_equal(found.absmax, [0, 1, 0])
    np.testing.assert_array_equal(found.signal, [0, 127**2, 0])
    np.testing.assert_array_equal(found.noise, [0, 0, 0])


@each_backend
@pytest.mark.parametrize("columns", [2, 64, 2048])
def test_row_too_small_for_a_finite_scale_gets_zero_codes(backend: Backend, columns: int) -> None:
    """1 / absmax overflows below 2^-128: bitsandbytes then writes garbage, we write zeros and the true absmax."""
    tiny = np.full((1, columns), 1e-40, np.float32)
    tiny[0, -1] = -1e-39
    found = backend.row_quantize(tiny.view(np.uint32), "F32")
    np.testing.assert_array_equal(found.codes, np.zeros((1, columns)))
    assert found.absmax[0] == np.float32(1e-39)
    assert_same(backend, tiny.view(np.uint32), "F32")


@each_backend
@each_dtype
@pytest.mark.parametrize("columns", [70, 72, 4096])
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_non_finite_values_show_in_absmax(backend: Backend, dtype: str, bad: float, columns: int) -> None:
    weight = np.ones((4, columns))
    weight[1, columns - 1] = bad
    weight[2, :2] = bad, np.inf  # NaN is larger than infinity
    found = backend.row_quantize(narrow(weight, dtype), dtype)
    np.testing.assert_array_equal(found.absmax, np.abs(weight).max(axis=1))


@each_backend
@settings(max_examples=50)
@given(
    weight=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 8), st.integers(1, 80)), elements=st.floats(-1e4, 1e4, width=32)
    )
)
def test_round_trip_error_is_at_most_half_a_step(backend: Backend, weight: np.ndarray) -> None:
    found = backend.row_quantize(weight.view(np.uint32), "F32")
    scale = found.absmax[:, None].astype(np.float64) / reference.N_STEPS
    error = np.abs(weight - found.codes * scale)
    # Half a step, and the three float32 roundings on the way to the code, each 2^-24 of at most 127 steps. Rows whose
    # 127 / absmax overflows, under 127 / 3.4e38, are lost as a whole.
    assert np.all(error <= scale * (0.5 + 3 * 127 * 2.0**-24) + 127 / np.finfo(np.float32).max)


@each_backend
@settings(max_examples=50)
@given(order=st.permutations(range(9)))
def test_permuting_rows_permutes_results(backend: Backend, order: list[int]) -> None:
    weight = normal(9, 72, "F16")
    straight, permuted = backend.row_quantize(weight, "F16"), backend.row_quantize(weight[order], "F16")
    for a, b in zip(straight, permuted, strict=True):
        np.testing.assert_array_equal(a[order], b)


@each_backend
@pytest.mark.parametrize("columns", [33, 64, 2048])
def test_largest_magnitude_of_every_row_has_code_127(backend: Backend, columns: int) -> None:
    found = backend.row_quantize(normal(100, columns, "BF16"), "BF16")
    assert (np.abs(found.codes.astype(int)).max(axis=1) == reference.N_STEPS).all()
