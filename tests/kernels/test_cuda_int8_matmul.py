"""The int8 products of CUDA, through the PTX interpreter, against the reference, and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels import int8_gemv, int8_skinny, reference
from cuda_kernels.reference import QuantizedActivations
from tests.kernels.backends import narrow, widen
from tests.kernels.int8_problems import Problem, assert_within_bound, problem
from tests.kernels.interpreted import Interpreted

# Few plans on many shapes, for every plan is compiled: a second and a half each.
GEMV = int8_gemv.plan(4, 2304, 9216)
SKINNY = int8_skinny.plan(16, 2304, 9216)
PLANS = {"gemv": GEMV, "skinny": SKINNY, "epilogue": None}
ENGINES = list(PLANS)
SHAPES = [
    # One of everything; K not a multiple of 16: every code a load of its own.
    (1, 1, 1),
    (2, 3, 31),
    (3, 33, 33),
    (5, 129, 127),
    (4, 31, 1025),
    (17, 65, 257),
    (1, 127, 1023),
    # K a multiple of 16, of the step, of the turn, and one vector more or less.
    (1, 32, 16),
    (4, 128, 128),
    (5, 31, 1024),
    (16, 33, 1040),
    (33, 17, 1008),
    (9, 255, 256),
    (2, 257, 2064),
]


def multiply(engine: str, p: Problem, shift: int = 0) -> np.ndarray:
    return Interpreted(engine, shift=shift).int8_matmul(*p, cut=PLANS[engine])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_product_is_within_the_bound_at_every_size(engine: str, shape: tuple[int, int, int]) -> None:
    p = problem(shape)
    assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engines_agree_to_the_bit(shape: tuple[int, int, int]) -> None:
    """So a token's output does not depend on how many stand beside it."""
    p = problem(shape, n=11, capacity=9, n_found=7, seed=1)
    gemv, skinny, epilogue = (multiply(engine, p) for engine in ENGINES)
    np.testing.assert_array_equal(gemv, skinny)
    np.testing.assert_array_equal(gemv, epilogue)


def test_plans_have_warps_share_rows() -> None:
    assert GEMV.split > 1 and SKINNY.split > 1


@pytest.mark.parametrize(
    ("engine", "dtype"), [("gemv", "F32"), ("skinny", "BF16"), ("epilogue", "BF16"), ("epilogue", "F32")]
)
def test_other_dtypes_are_within_their_bound(engine: str, dtype: str) -> None:
    for shape in ((3, 35, 272), (18, 64, 288)):
        p = problem(shape, dtype, n=5, capacity=3, n_found=3)
        assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("n", "capacity", "n_found"),
    [(0, 0, 0), (0, 1, 1), (1, 0, 0), (7, 0, 0), (8, 8, 0), (9, 8, 8), (31, 5, 9), (40, 3, 1)],
)
def test_every_outlier_term_counts_once(engine: str, n: int, capacity: int, n_found: int) -> None:
    p = problem((6, 37, 304), n=n, capacity=capacity, n_found=n_found)
    assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_columns_are_outliers(engine: str) -> None:
    p = problem((3, 20, 48), n=48, capacity=0)
    assert not p.x.codes.any()
    assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_bias_adds_nothing(engine: str) -> None:
    p = problem((2, 36, 64), has_bias=False)
    assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("engine", ENGINES)
def test_list_beyond_the_columns_found_is_not_looked_at(engine: str) -> None:
    """Its columns are -1, which would be an access outside the weights; its x is poisoned here."""
    p = problem((2, 36, 64), capacity=6, n_found=2)
    p.x.found_x[:, 2:] = narrow(np.nan, "F16")
    assert_within_bound(multiply(engine, p), p)


@pytest.mark.parametrize("engine", ["gemv", "skinny"])
def test_misaligned_codes_take_the_slow_path(engine: str) -> None:
    p = problem((3, 35, 272))
    np.testing.assert_array_equal(multiply(engine, p, shift=3), multiply(engine, p))


@pytest.mark.parametrize("engine", ["gemv", "skinny"])
def test_integer_sums_are_exact_at_their_largest(engine: str) -> None:
    """Every product 127 * 127, and scales of 1: beyond K = 1040 float32 could not have summed them."""
    M, N, K = 1, 4, 4096
    codes, weight = np.full((M, K), 127, np.int8), np.full((N, K), 127, np.int8)
    weight[1], weight[2, ::2] = -127, 126
    ones, none = np.full(4, 127, np.float32), np.zeros((1, 0), np.uint32)
    x = QuantizedActivations(codes, ones[:M], none, np.zeros(0, np.int32), np.zeros(1, np.int32), none)
    p = Problem(x, "F32", weight, ones, np.zeros((N, 0), np.uint32), None)
    exact = codes.astype(np.int64) @ weight.T.astype(np.int64)
    # 127 * fl(1 / 127) is 1; the only rounding is that of the integer to float32.
    np.testing.assert_array_equal(widen(multiply(engine, p), "F32"), exact.astype(np.float32))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_runs_give_the_same_bits(engine: str) -> None:
    p = problem((5, 37, 304), n=9, capacity=4, n_found=3)
    np.testing.assert_array_equal(multiply(engine, p), multiply(engine, p))


@pytest.mark.parametrize("engine", ENGINES)
def test_token_of_infinite_absmax_is_not_finite_and_stays_alone(engine: str) -> None:
    p = problem((3, 36, 64))
    p.x.codes[1], p.x.absmax[1] = 0, np.inf
    finite = np.isfinite(widen(multiply(engine, p), "F16"))
    np.testing.assert_array_equal(finite, np.broadcast_to([[True], [False], [True]], finite.shape))


@pytest.mark.parametrize("engine", ENGINES)
def test_too_large_an_output_becomes_infinite(engine: str) -> None:
    p = problem((2, 36, 64))
    p.x.absmax[:] = 1e9
    y = widen(multiply(engine, p), "F16")
    exact = reference.int8_matmul(p.x, p.weight_codes, p.weight_absmax, np.zeros((36, 3)), None)
    assert (np.abs(exact) > 1e5).any()
    np.testing.assert_array_equal(y[np.abs(exact) > 1e5], np.sign(exact[np.abs(exact) > 1e5]) * np.inf)


@pytest.mark.parametrize("cut", [int8_gemv.plan(1, 9216, 9216), int8_gemv.plan(8, 9216, 9216)], ids=str)
def test_other_gemv_plans_give_the_same_bits(cut: int8_gemv.Plan) -> None:
    p = problem((9, 67, 3600))
    np.testing.assert_array_equal(Interpreted("gemv").int8_matmul(*p, cut=cut), multiply("gemv", p))


def test_other_skinny_plan_gives_the_same_bits() -> None:
    p, cut = problem((70, 67, 1552)), int8_skinny.plan(64, 9216, 9216)
    np.testing.assert_array_equal(Interpreted("skinny").int8_matmul(*p, cut=cut), multiply("skinny", p))
