"""The int8 products of CUDA, through the PTX interpreter: what the tests of all backends do not ask.

Those go by the engine that a size chooses; here every engine takes every size.
"""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels.cuda import int8_gemv, int8_skinny
from cuda_kernels.cuda.int8_matmul import Engine
from tests.kernels.backends import widen
from tests.kernels.cuda_backends import GEMV, SKINNY, Interpreted
from tests.kernels.layers import Product, assert_close, make_product, without_bias
from tests.kernels.outputs import Bits

ENGINES = [Engine.GEMV, Engine.SKINNY, Engine.LIBRARY]
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

every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.value)


def multiply(engine: Engine, p: Product, shift: int = 0, cut: object = None) -> Bits:
    return Interpreted(shift=shift).int8_matmul(p.x, p.weight, p.dtype, engine=engine, cut=cut)


def problem(shape: tuple[int, int, int], dtype: str = "F16", n: int = 3, found: int = 1, capacity: int = 2) -> Product:
    n = min(n, shape[2])
    return make_product(*shape, dtype, n, min(found, shape[2] - n), capacity)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engines_are_within_the_bound_and_agree_to_the_bit(shape: tuple[int, int, int]) -> None:
    """So a token's output does not depend on how many stand beside it."""
    p = problem(shape, n=11, found=7, capacity=9)
    gemv, skinny, epilogue = (multiply(engine, p) for engine in ENGINES)
    assert_close(gemv, p)
    np.testing.assert_array_equal(gemv, skinny)
    np.testing.assert_array_equal(gemv, epilogue)


@pytest.mark.parametrize(("engine", "dtype"), [(Engine.GEMV, "F32"), (Engine.SKINNY, "BF16")])
def test_other_dtypes_are_within_their_bound(engine: Engine, dtype: str) -> None:
    for shape in ((3, 35, 272), (18, 64, 288)):
        p = problem(shape, dtype, n=5, found=3, capacity=3)
        assert_close(multiply(engine, p), p)


def test_plans_have_warps_share_rows() -> None:
    """Or the tests would not see whether sums of several warps meet."""
    assert GEMV.split > 1 and SKINNY.split > 1


@every_engine
@pytest.mark.parametrize(
    ("n", "capacity", "found"), [(0, 0, 0), (0, 1, 1), (7, 0, 0), (8, 8, 0), (9, 8, 8), (31, 5, 9)]
)
def test_every_outlier_term_counts_once(engine: Engine, n: int, capacity: int, found: int) -> None:
    """Eight of them are in shared memory at a time."""
    p = problem((6, 37, 304), n=n, found=found, capacity=capacity)
    assert_close(multiply(engine, p), p)


@every_engine
def test_no_bias_adds_nothing(engine: Engine) -> None:
    p = without_bias(problem((2, 36, 64)))
    assert_close(multiply(engine, p), p)


@pytest.mark.parametrize("engine", [Engine.GEMV, Engine.SKINNY])
def test_misaligned_codes_take_the_slow_path(engine: Engine) -> None:
    p = problem((3, 35, 272))
    np.testing.assert_array_equal(multiply(engine, p, shift=3), multiply(engine, p))


@every_engine
def test_token_of_infinite_absmax_is_not_finite_and_stays_alone(engine: Engine) -> None:
    p = problem((3, 36, 64))
    p.x.codes[1], p.x.absmax[1] = 0, np.inf
    finite = np.isfinite(widen(multiply(engine, p), "F16"))
    np.testing.assert_array_equal(finite, np.broadcast_to([[True], [False], [True]], finite.shape))


@pytest.mark.parametrize("cut", [int8_gemv.plan(1, 9216, 9216), int8_gemv.plan(8, 9216, 9216)], ids=str)
def test_other_gemv_plans_give_the_same_bits(cut: int8_gemv.Plan) -> None:
    """More tokens than a block takes, and columns for two turns and a part of one."""
    p = problem((9, 67, 5136))
    np.testing.assert_array_equal(multiply(Engine.GEMV, p, cut=cut), multiply(Engine.GEMV, p))


def test_other_skinny_plan_gives_the_same_bits() -> None:
    p = problem((70, 67, 1552))
    cut = int8_skinny.plan(64, 9216, 9216)
    np.testing.assert_array_equal(multiply(Engine.SKINNY, p, cut=cut), multiply(Engine.SKINNY, p))


def test_blocks_on_turing_have_the_bits_of_later_devices() -> None:
    """Four smaller mma in place of one; integers come out the same."""
    p = make_product(9, 40, 300, "F16", 3, 1, 2, block_size=64)
    y = Interpreted(cc=(7, 5)).int8_matmul(p.x, p.weight, "F16")
    assert_close(y, p)
    np.testing.assert_array_equal(y, Interpreted().int8_matmul(p.x, p.weight, "F16"))
