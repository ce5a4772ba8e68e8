"""Floating-point instructions against exact fractions, rounded by the book (IEEE 754, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.tools.ptx import Memory, execute
from tests.tools.ptx.exact import EXACT, FORMATS, ROUNDINGS, check, decoded, draws
from tests.tools.ptx.snippets import HEADER, evaluate, kernel

ARITHMETIC: list[tuple[str, int, EXACT]] = [
    ("add", 2, lambda a, b: a + b), ("sub", 2, lambda a, b: a - b), ("mul", 2, lambda a, b: a * b),
    ("fma", 3, lambda a, b, c: a * b + c),
]  # fmt: skip
KINDS = [("f32", rounding) for rounding in ROUNDINGS] + [("f16", "rn"), ("bf16", "rn"), ("f64", "rn")]


@pytest.mark.parametrize(("kind", "rounding"), KINDS)
@pytest.mark.parametrize(("name", "n_sources", "exact"), ARITHMETIC, ids=[case[0] for case in ARITHMETIC])
def test_result_is_the_exact_one_rounded_once(
    name: str, n_sources: int, exact: EXACT, kind: str, rounding: str
) -> None:
    body = f"{name}.{rounding}.{kind} %out, {', '.join(['%a', '%b', '%c'][:n_sources])};"
    check(body, draws(kind, n_sources), [kind] * n_sources, kind, rounding, exact)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_is_rounded_once(kind: str) -> None:
    a, b = draws(kind, 2)
    b = np.where(b << b.dtype.type(1) == 0, b.dtype.type(FORMATS[kind].largest_exponent), b)
    check(f"div.rn.{kind} %out, %a, %b;", [a, b], [kind] * 2, kind, "rn", lambda x, y: x / y)
    check(f"rcp.rn.{kind} %out, %a;", [b], [kind], kind, "rn", lambda x: 1 / x)


def test_square_root_is_the_nearest() -> None:
    bits = draws("f32", 1)[0] & np.uint32(0x7FFFFFFF)
    found = evaluate("sqrt.rn.f32 %out, %a;", bits, out=np.uint32)
    for x, root in zip(bits.tolist(), found.tolist(), strict=True):
        value, below, above = (decoded(each, "f32") for each in (x, max(root - 1, 0), root + 1))
        middle = decoded(root, "f32")
        assert ((below + middle) / 2) ** 2 <= value <= ((middle + above) / 2) ** 2


def test_fused_product_is_not_rounded_twice() -> None:
    """Through float64 this is a tie, which goes the other way: the product ends in -2^-60, beyond 53 bits."""
    a, b, c = np.float32((1 + 2**-18) * 2**-12), np.float32((1 - 2**-18) * 2**-12), np.float32(1 + 2**-23)
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) == np.float32(1 + 2**-22)
    columns = [np.full(32, each) for each in (a, b, c)]
    assert evaluate("fma.rn.f32 %out, %a, %b, %c;", *columns, out=np.float32)[0] == np.float32(1 + 2**-23)


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 3e38], np.float32)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    return SPECIAL.repeat(len(SPECIAL)), np.tile(SPECIAL, len(SPECIAL))


@pytest.mark.parametrize(("name", "beats"), [("min", lambda a, b: a < b), ("max", lambda a, b: a > b)])
def test_min_and_max_order_zeros_and_lose_or_keep_nan(name: str, beats: Callable[[float, float], bool]) -> None:
    a, b = pairs()
    plain, keeping = (evaluate(f"{name}{nan}.f32 %out, %a, %b;", a, b, out=np.uint32) for nan in ("", ".NaN"))
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        if math.isnan(x) or math.isnan(y):
            number = y if math.isnan(x) else x
            wanted = 0x7FFFFFFF if math.isnan(number) else int(np.float32(number).view(np.uint32))
            assert (plain[i], keeping[i]) == (wanted, 0x7FFFFFFF)
        else:
            first = beats(math.copysign(1, x), math.copysign(1, y)) if x == y == 0 else beats(x, y)
            assert plain[i] == keeping[i] == np.float32(x if first else y).view(np.uint32)


def test_every_nan_that_is_computed_is_the_hardware_s() -> None:
    a, b = pairs()
    for body in ("add.f32 %out, %a, %b;", "mul.f32 %out, %a, %b;", "fma.rn.f32 %out, %a, %b, %a;"):
        found = evaluate(body, a, b, out=np.uint32)
        nan = np.isnan(found.view(np.float32))
        assert nan.any() and (found[nan] == 0x7FFFFFFF).all()
    for to in ("f16", "bf16"):
        assert evaluate(f"cvt.rn.{to}.f32 %out, %a;", np.full(32, np.nan, np.float32), out=np.uint16)[0] == 0x7FFF


def test_ftz_flushes_what_goes_in_and_what_comes_out() -> None:
    tiny, normal, half = (np.full(32, each, np.float32) for each in (-1e-40, 2e-38, 0.5))
    assert evaluate("mul.f32 %out, %a, %b;", normal, half, out=np.float32)[0] != 0
    assert evaluate("mul.ftz.f32 %out, %a, %b;", normal, half, out=np.uint32)[0] == 0
    assert evaluate("add.ftz.f32 %out, %a, %b;", tiny, normal, out=np.float32)[0] == np.float32(2e-38)
    assert evaluate("abs.ftz.f32 %out, %a;", tiny, out=np.uint32)[0] == 0
    assert evaluate("neg.ftz.f32 %out, %a;", -tiny, out=np.uint32)[0] == 0x80000000
    found = evaluate("setp.lt.ftz.f32 %p1, %a, 0f00000000; selp.u32 %out, 1, 0, %p1;", tiny, out=np.uint32)
    assert found[0] == 0


def test_saturation_ends_at_zero_and_one() -> None:
    values = np.array([-2, -0.0, 0.25, 1.5, np.nan, np.inf] * 8, np.float32)
    found = evaluate("add.sat.f32 %out, %a, 0f00000000;", values, out=np.uint32)[:6].view(np.float32)
    np.testing.assert_array_equal(found, np.array([0, 0, 0.25, 1, 0, 1], np.float32))


def test_sign_operations_touch_only_the_sign() -> None:
    a, b = pairs()
    bits, sign = a.view(np.uint32), np.uint32(1 << 31)
    np.testing.assert_array_equal(evaluate("abs.f32 %out, %a;", a, out=np.uint32), bits & ~sign)
    np.testing.assert_array_equal(evaluate("neg.f32 %out, %a;", a, out=np.uint32), bits ^ sign)
    found = evaluate("copysign.f32 %out, %a, %b;", a, b, out=np.uint32)
    np.testing.assert_array_equal(found, (bits & sign) | (b.view(np.uint32) & ~sign))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_are_computed_half_by_half(kind: str) -> None:
    single = kind.removesuffix("x2")
    low, high = draws(single, 2)
    words = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
    other = words[::-1].copy()
    for name in ("min", "max", "fma.rn"):
        third = ", %a" if name == "fma.rn" else ""
        found = evaluate(f"{name}.{kind} %out, %a, %b{third};", words, other, out=np.uint32)
        alone = [
            evaluate(f"{name}.{single} %out, %a, %b{third};", each, each[::-1].copy(), out=np.uint16)
            for each in (low, high)
        ]
        np.testing.assert_array_equal(found, alone[0].astype(np.uint32) | alone[1].astype(np.uint32) << np.uint32(16))


def test_approximations_are_named_in_the_trace() -> None:
    memory, values = Memory(), np.full(32, 3, np.float32)
    out = values.copy()
    text = HEADER + kernel("rcp.approx.f32 %out, %a; div.full.f32 %out, %out, %a; div.rn.f32 %out, %out, %a;", [4], 4)
    trace = execute(text, 1, 32, [memory.place(values), memory.place(out)], memory)
    assert trace.approximate == {"rcp.approx.f32": 32, "div.full.f32": 32}
    np.testing.assert_allclose(out, 1 / 27, rtol=1e-6)


def test_sum_of_zero_is_negative_only_downwards() -> None:
    a = np.full(32, 1.5, np.float32)
    for rounding, expected in (("rn", 0), ("rz", 0), ("rp", 0), ("rm", 0x80000000)):
        assert evaluate(f"sub.{rounding}.f32 %out, %a, %a;", a, out=np.uint32)[0] == expected
