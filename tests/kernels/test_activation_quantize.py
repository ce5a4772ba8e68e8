"""Every backend's quantized activations against the reference, the reference against the paper's rule spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels import reference
from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD, QuantizedActivations
from tests.kernels.backends import DTYPES, Backend, Bits, Reference, backends, narrow, widen
from tests.kernels.cuda_backends import Interpreted
from tests.kernels.layers import make_tokens

SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025]
NONE = np.empty(0, np.int32)

every_backend = pytest.mark.parametrize("backend", backends("activation_quantize"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def columns(*indices: int) -> np.ndarray:
    return np.array(indices, np.int32)


def assert_same(
    backend: Backend,
    x: Bits,
    dtype: str,
    stored: np.ndarray,
    capacity: int,
    threshold: float = OUTLIER_THRESHOLD,
    block_size: int = 0,
) -> QuantizedActivations:
    """Equal in every bit; the codes of a block whose absmax is not finite mean nothing."""
    found = backend.activation_quantize(x, dtype, stored, threshold, capacity, block_size)
    expected = Reference().activation_quantize(x, dtype, stored, threshold, capacity, block_size)
    finite = np.isfinite(expected.absmax).repeat(block_size or x.shape[1] or 1, 1)[:, : x.shape[1]]
    for name in ("absmax", "outlier_x", "found_columns", "n_found", "found_x"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(found.codes[finite], expected.codes[finite])
    return found


@every_backend
@every_dtype
@pytest.mark.parametrize("n_columns", SIZES)
def test_codes_and_columns_equal_the_reference_at_every_size(backend: Backend, dtype: str, n_columns: int) -> None:
    order = np.random.default_rng(n_columns).permutation(n_columns)
    outliers, stored = order[:5], np.sort(order[3:8]).astype(np.int32)
    for n_tokens in (1, 7):
        x = make_tokens(n_tokens, n_columns, dtype, list(outliers), seed=n_columns)
        assert_same(backend, x, dtype, stored, capacity=4)
        assert_same(backend, x, dtype, stored, capacity=0)
        assert_same(backend, x, dtype, NONE, capacity=5)


@every_backend
@pytest.mark.parametrize(("dtype", "block_size"), [("F16", 64), ("BF16", 128), ("F32", 256)])
@pytest.mark.parametrize("n_columns", [1, 64, 129, 300])
def test_blocks_have_scales_of_their_own_at_every_size(
    backend: Backend, dtype: str, block_size: int, n_columns: int
) -> None:
    """Against the reference, which quantizes each block as a row; the last block may be smaller."""
    order = np.random.default_rng(n_columns).permutation(n_columns)
    outliers, stored = order[:5], np.sort(order[3:8]).astype(np.int32)
    x = make_tokens(5, n_columns, dtype, list(outliers), seed=n_columns)
    assert_same(backend, x, dtype, stored, capacity=4, block_size=block_size)
    assert_same(backend, x, dtype, NONE, capacity=0, block_size=block_size)


@every_backend
def test_what_is_not_finite_spoils_its_block_alone(backend: Backend) -> None:
    x = make_tokens(3, 300, "BF16", [])
    x[1, 130] = narrow(float("nan"), "BF16")
    found = assert_same(backend, x, "BF16", NONE, capacity=0, block_size=128)
    np.testing.assert_array_equal(np.isfinite(found.absmax), [[True] * 3, [True, False, True], [True] * 3])
    assert not found.codes[1, 128:256].any()


@every_backend
def test_large_value_widens_the_steps_of_its_block_alone(backend: Backend) -> None:
    x = make_tokens(1, 256, "F16", [70])
    plain, blocks = (backend.activation_quantize(x, "F16", NONE, 6.0, 0, size) for size in (0, 64))
    inside = np.arange(256) // 64 == 1
    assert np.abs(plain.codes[0, ~inside]).max() < 127
    assert [np.abs(blocks.codes[0, k : k + 64]).max() for k in range(0, 256, 64)] == [127] * 4


@every_backend
@pytest.mark.parametrize("n_tokens", [1, 2, 31, 32, 33, 129])
def test_a_column_is_found_whichever_token_it_stands_out_in(backend: Backend, n_tokens: int) -> None:
    """Every eighth token at once, each in a column of its own: none is found by way of another."""
    for first in range(min(n_tokens, 8)):
        tokens = np.arange(first, n_tokens, 8)
        x = make_tokens(n_tokens, 70, "F16", [], seed=first)
        x[tokens, tokens % 70] = narrow(-6.5, "F16")
        found = assert_same(backend, x, "F16", NONE, capacity=tokens.size)
        np.testing.assert_array_equal(found.found_columns, np.sort(tokens % 70))


@every_backend
@every_dtype
def test_every_column_stored_leaves_no_codes(backend: Backend, dtype: str) -> None:
    x = make_tokens(5, 65, dtype, [0, 64])
    found = assert_same(backend, x, dtype, np.arange(65, dtype=np.int32), capacity=3)
    assert not found.codes.any() and not found.absmax.any()
    np.testing.assert_array_equal(found.outlier_x, x)


@every_backend
@every_dtype
def test_every_column_found_leaves_no_codes(backend: Backend, dtype: str) -> None:
    x = make_tokens(3, 40, dtype, list(range(40)))
    found = assert_same(backend, x, dtype, NONE, capacity=40)
    assert not found.codes.any() and not found.absmax.any()
    np.testing.assert_array_equal(found.found_x, x)


@every_backend
@every_dtype
def test_columns_past_the_list_are_counted_and_quantized(backend: Backend, dtype: str) -> None:
    x = make_tokens(9, 300, dtype, [299, 1, 130, 64, 63, 200])
    found = assert_same(backend, x, dtype, columns(130), capacity=3)
    np.testing.assert_array_equal(found.found_columns, [1, 63, 64])
    assert found.n_found == 5
    assert (found.codes[:, [200, 299]] != 0).all()


@every_backend
@every_dtype
def test_a_stored_column_is_not_found_again(backend: Backend, dtype: str) -> None:
    x = make_tokens(4, 128, dtype, [3, 90])
    found = assert_same(backend, x, dtype, columns(3, 90, 100), capacity=2)
    assert found.n_found == 0
    np.testing.assert_array_equal(found.found_columns, [-1, -1])
    assert not found.found_x.any()


@every_backend
@every_dtype
def test_the_threshold_itself_is_an_outlier_and_the_value_below_is_not(backend: Backend, dtype: str) -> None:
    at = narrow(OUTLIER_THRESHOLD, dtype)
    below = at - at.dtype.type(1)
    sign = at.dtype.type(1 << (at.itemsize * 8 - 1))
    x = np.stack([np.array([at, below, at | sign, below | sign], at.dtype)])
    found = assert_same(backend, x, dtype, NONE, capacity=4)
    np.testing.assert_array_equal(found.found_columns, [0, 2, -1, -1])


@every_backend
def test_a_threshold_between_two_values_is_not_rounded_to_one(backend: Backend) -> None:
    """6.001 is not an fp16 value; 6.0 is below it and the next one above."""
    x = narrow([[6.0, 6.00390625]], "F16")
    found = assert_same(backend, x, "F16", NONE, capacity=2, threshold=6.001)
    np.testing.assert_array_equal(found.found_columns, [1, -1])


@every_backend
@every_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_found_or_show_in_absmax(backend: Backend, dtype: str, bad: float) -> None:
    x = make_tokens(3, 70, dtype, [])
    x[1, 69] = narrow(bad, dtype)
    found = assert_same(backend, x, dtype, NONE, capacity=1)
    np.testing.assert_array_equal(found.found_columns, [69])
    assert np.isfinite(found.absmax).all()
    left = assert_same(backend, x, dtype, NONE, capacity=0)
    np.testing.assert_array_equal(np.isfinite(left.absmax[:, 0]), [True, False, True])
    stored = assert_same(backend, x, dtype, columns(69), capacity=0)
    assert np.isfinite(stored.absmax).all()


@every_backend
@every_dtype
def test_a_token_of_zeros_gets_zero_codes(backend: Backend, dtype: str) -> None:
    x = make_tokens(3, 129, dtype, [])
    x[1] = narrow(-0.0, dtype)
    found = assert_same(backend, x, dtype, columns(4), capacity=1)
    assert not found.codes[1].any() and found.absmax[1] == 0


@every_backend
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern_is_read_exactly(backend: Backend, dtype: str) -> None:
    every = np.arange(1 << 16).astype(np.uint16)
    finite = every[np.isfinite(widen(every, dtype))]
    for chunk in np.array_split(finite, 64):
        assert_same(backend, chunk[None], dtype, NONE, capacity=0)
    assert_same(backend, every.reshape(64, 1024), dtype, NONE, capacity=1024)


@every_backend
@every_dtype
def test_rows_that_lie_apart_are_read_where_they_are(backend: Backend, dtype: str) -> None:
    wide = make_tokens(9, 200, dtype, [])
    wide[:, 65:] = narrow(float("nan"), dtype)
    wide[:, 3] = narrow(8.5, dtype)
    found = assert_same(backend, wide[:, :65], dtype, columns(1), capacity=2)
    assert found.n_found == 1


@every_backend
def test_no_tokens_give_no_codes(backend: Backend) -> None:
    found = assert_same(backend, np.empty((0, 70), np.uint16), "F16", columns(3), capacity=2)
    assert found.codes.shape == (0, 70) and found.found_x.shape == (0, 2)


@every_backend
def test_two_runs_agree_in_every_bit(backend: Backend) -> None:
    x = make_tokens(33, 257, "BF16", [5, 77])
    for first, second in zip(
        *(backend.activation_quantize(x, "BF16", columns(5), 6.0, 4) for _ in range(2)), strict=True
    ):
        np.testing.assert_array_equal(first, second)


@every_backend
def test_permuting_tokens_permutes_results(backend: Backend) -> None:
    x = make_tokens(9, 65, "F16", [8])
    straight = backend.activation_quantize(x, "F16", columns(2), 6.0, 2)

    @settings(max_examples=20 if isinstance(backend, Interpreted) else 100)  # one takes 50 ms to interpret
    @given(order=st.permutations(range(9)))
    def check(order: list[int]) -> None:
        permuted = backend.activation_quantize(x[order], "F16", columns(2), 6.0, 2)
        for name in ("codes", "absmax", "outlier_x", "found_x"):
            np.testing.assert_array_equal(getattr(straight, name)[order], getattr(permuted, name))
        np.testing.assert_array_equal(straight.found_columns, permuted.found_columns)

    check()


@every_backend
def test_round_trip_error_is_at_most_half_a_step(backend: Backend) -> None:
    x = make_tokens(50, 129, "F32", [17])
    found = backend.activation_quantize(x, "F32", columns(17), 6.0, 0)
    rest = widen(x, "F32").astype(np.float64)
    rest[:, 17] = 0
    scale = found.absmax.astype(np.float64) / N_STEPS
    # Half a step, and the three float32 roundings on the way to the code, each 2^-24 of at most 127 steps.
    assert (np.abs(rest - found.codes * scale) <= scale * (0.5 + 3 * 127 * 2.0**-24)).all()


def test_reference_leaves_whole_columns_out_of_the_maximum() -> None:
    """The paper's rule, spelled out: 5 stands in an outlier column, so the step is 4 / 127 and not 5 / 127."""
    x = np.array([[5.0, 4.0, 1.0], [7.0, -2.0, 0.5]], np.float32)
    found = reference.activation_quantize(x, NONE, 6.0, 1)
    np.testing.assert_array_equal(found.absmax, [[4], [2]])
    np.testing.assert_array_equal(found.codes, [[0, 127, 32], [0, -127, 32]])
    np.testing.assert_array_equal(found.found_x, [[5], [7]])
