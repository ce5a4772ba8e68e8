"""The activation quantizer of CUDA, through the PTX interpreter, against the reference: every output bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.cuda.activation_quantize import Plan
from cuda_kernels.reference import QuantizedActivations
from tests.kernels.backends import Reference, narrow, widen
from tests.kernels.cuda_backends import Interpreted
from tests.kernels.outputs import Bits

# Few plans on many shapes, for every plan is compiled: one to two seconds each.
OWN = Plan(threads=64, tokens=2, own_tokens=1000, mark_tokens=16)
MARKED = OWN._replace(own_tokens=0, mark_tokens=3)
SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025]
WHOLE_GROUPS = [8, 16, 248, 256, 264, 1024, 1040]
NO_COLUMNS = np.empty(0, np.int32)


def activations(n_tokens: int, n_columns: int, dtype: str = "F16", seed: int = 0) -> Bits:
    """All-different values; about one column in twelve has outliers, and one in twelve comes close."""
    random = np.random.default_rng([seed, n_tokens, n_columns])
    scale = random.choice([1.0, 1.9, 20.0], n_columns, p=[10 / 12, 1 / 12, 1 / 12])
    return narrow(np.clip(random.normal(0, 1, (n_tokens, n_columns)), -3, 3) * scale, dtype)


def some_columns(n_columns: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(count).permutation(n_columns)[:count]).astype(np.int32)


def assert_same(
    x: Bits,
    dtype: str,
    outlier_columns: np.ndarray,
    capacity: int,
    cut: Plan = OWN,
    threshold: float = 6.0,
    shift: int = 0,
) -> QuantizedActivations:
    expected = Reference().activation_quantize(x, dtype, outlier_columns, threshold, capacity)
    found = Interpreted(shift=shift).activation_quantize(x, dtype, outlier_columns, threshold, capacity, cut=cut)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    return found


@pytest.mark.parametrize("n_columns", SIZES + WHOLE_GROUPS)
def test_stored_columns_alone(n_columns: int) -> None:
    for n_tokens in (1, 5):
        found = assert_same(activations(n_tokens, n_columns), "F16", some_columns(n_columns, n_columns // 20), 0)
        assert found.n_found[0] == 0


@pytest.mark.parametrize("n_columns", SIZES + WHOLE_GROUPS)
def test_columns_found_by_every_block(n_columns: int) -> None:
    for capacity in (1, 200):
        assert_same(activations(3, n_columns), "F16", some_columns(n_columns, n_columns // 20), capacity)


@pytest.mark.parametrize("n_columns", SIZES + WHOLE_GROUPS)
def test_columns_found_by_a_launch_before(n_columns: int) -> None:
    for capacity in (1, 200):
        assert_same(activations(7, n_columns), "F16", some_columns(n_columns, n_columns // 20), capacity, MARKED)


@pytest.mark.parametrize(("dtype", "cut"), [("BF16", MARKED), ("F32", OWN)], ids=["BF16", "F32"])
def test_other_dtypes(dtype: str, cut: Plan) -> None:
    for n_tokens, n_columns in ((1, 264), (6, 1040)):
        x = activations(n_tokens, n_columns, dtype)
        assert_same(x, dtype, some_columns(n_columns, 9), 50, cut)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5, 8, 17])
def test_every_piece_of_the_tokens_is_looked_at(n_tokens: int) -> None:
    """One outlier, in each token in turn."""
    for token in range(n_tokens):
        x = activations(n_tokens, 264)
        x[np.abs(widen(x, "F16")) >= 6] = 0
        x[token, 100 + token] = narrow(-6.0, "F16")
        found = assert_same(x, "F16", NO_COLUMNS, 2, MARKED)
        assert found.found_columns[0] == 100 + token


@pytest.mark.parametrize("cut", [OWN, MARKED], ids=["own", "marked"])
def test_more_columns_than_the_list_holds_leave_the_first_in_it(cut: Plan) -> None:
    x = activations(4, 1024, seed=1)
    found = assert_same(x, "F16", NO_COLUMNS, 3, cut)
    assert found.n_found[0] > 3
    assert found.absmax.max() > 6, "the columns past the list were quantized like any other"


@pytest.mark.parametrize("cut", [OWN, MARKED], ids=["own", "marked"])
def test_every_column_found(cut: Plan) -> None:
    """More than one round of a block's threads, and a list as long as the columns are many."""
    x = narrow(np.random.default_rng(2).normal(100, 5, (3, 1040)), "F16")
    found = assert_same(x, "F16", NO_COLUMNS, 1040, cut)
    assert found.n_found[0] == 1040 and not found.codes.any() and not found.absmax.any()


def test_all_columns_stored() -> None:
    found = assert_same(activations(2, 264), "F16", np.arange(264, dtype=np.int32), 0)
    assert not found.codes.any()


def test_stored_column_is_not_found_again() -> None:
    x = activations(2, 264)
    x[1, 77] = narrow(50.0, "F16")
    found = assert_same(x, "F16", np.array([77], np.int32), 300)
    assert 77 not in found.found_columns


@pytest.mark.parametrize("cut", [OWN, MARKED], ids=["own", "marked"])
def test_threshold_itself_is_an_outlier_and_less_is_none(cut: Plan) -> None:
    x = np.zeros((2, 264), np.float16)
    x[0, 5], x[1, 9], x[0, 13] = 6.0, -6.0, np.nextafter(np.float16(6), np.float16(0))
    found = assert_same(x.view(np.uint16), "F16", NO_COLUMNS, 4, cut)
    np.testing.assert_array_equal(found.found_columns, [5, 9, -1, -1])


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_non_finite_values(dtype: str, bad: float) -> None:
    """Left in they show in absmax and leave no codes; found or stored they harm no one."""
    x = narrow(np.random.default_rng(3).normal(0, 1, (3, 264)), dtype)
    x[1, 33] = narrow(bad, dtype)
    left = assert_same(x, dtype, NO_COLUMNS, 0)
    np.testing.assert_array_equal(np.isfinite(left.absmax[:, 0]), [True, False, True])
    assert not left.codes[1].any() and left.codes[0].any()
    assert assert_same(x, dtype, NO_COLUMNS, 4).found_columns[0] == 33
    assert np.isfinite(assert_same(x, dtype, np.array([33], np.int32), 0).absmax).all()


def test_zero_and_tiny_tokens_get_zero_codes() -> None:
    x = np.zeros((4, 264), np.float32)
    x[1], x[2], x[3, 0] = -0.0, 1e-39, 1e-45
    x[0, 8] = 1
    found = assert_same(x.view(np.uint32), "F32", NO_COLUMNS, 0)
    assert not found.codes[1:].any() and found.codes[0, 8] == 127


def test_ties_go_to_even() -> None:
    x = np.zeros((1, 264), np.float16)
    x[0, :7] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    found = assert_same(x.view(np.uint16), "F16", NO_COLUMNS, 0)
    np.testing.assert_array_equal(found.codes[0, :7], [127, 0, 2, 2, 0, -2, -2])


@pytest.mark.parametrize("capacity", [0, 20])
def test_rows_that_lie_apart_are_read_where_they_are(capacity: int) -> None:
    """What lies between them is NaN. By 16 bytes, so by vectors; by one value; and by none from a misaligned start."""
    for apart, shift in ((8, 0), (1, 0), (0, 1)):
        x = activations(5, 264 + apart)[:, :264]
        assert_same(x, "F16", some_columns(264, 5), capacity, shift=shift)


def test_columns_of_the_widest_model_fit() -> None:
    """32 KiB of bits; the list's one column is the last."""
    x = np.zeros((1, 262_144), np.uint16)
    x[0, ::7] = narrow(np.random.default_rng(4).normal(0, 1, x[0, ::7].size), "F16")
    x[0, -1] = narrow(9.0, "F16")
    cut = Plan(threads=1024, tokens=1, own_tokens=8, mark_tokens=16)
    found = assert_same(x, "F16", np.array([0, 262_142], np.int32), 2, cut)
    np.testing.assert_array_equal(found.found_columns, [262_143, -1])


@pytest.mark.parametrize("cut", [OWN, MARKED], ids=["own", "marked"])
def test_two_runs_give_the_same_bits(cut: Plan) -> None:
    x = activations(5, 1040)
    assert_same(x, "F16", some_columns(1040, 9), 20, cut)
    assert_same(x, "F16", some_columns(1040, 9), 20, cut)


def test_threads_do_not_change_the_result() -> None:
    x = activations(3, 2064)
    for threads, tokens in ((1024, 1), (64, 3)):
        assert_same(x, "F16", some_columns(2064, 9), 40, OWN._replace(threads=threads, tokens=tokens))
