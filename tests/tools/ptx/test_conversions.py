"""Conversions between integers and floats of all widths, against exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.tools.ptx.exact import FORMATS, ROUNDINGS, check, draws, encoded
from tests.tools.ptx.snippets import evaluate

NARROWINGS = [(source, to, r) for source, to in (("f32", "f16"), ("f64", "f32")) for r in ROUNDINGS]
NARROWINGS += [("f32", "bf16", "rn"), ("f32", "bf16", "rz")]


@pytest.mark.parametrize(("source", "to", "rounding"), NARROWINGS)
def test_narrowing_rounds_once(source: str, to: str, rounding: str) -> None:
    columns = draws(source, 1, 800)
    if to != "f32":
        around = (columns[0] & np.uint32(0x80000FFF)) | np.uint32(0x38000000)
        columns = [np.concatenate([columns[0], around, around & np.uint32(0xFFFFF000)])[:1024]]
    check(f"cvt.{rounding}.{to}.{source} %out, %a;", columns, [source], to, rounding, lambda a: a)


@pytest.mark.parametrize(("source", "to"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f64")])
def test_widening_is_exact(source: str, to: str) -> None:
    check(f"cvt.{to}.{source} %out, %a;", draws(source, 1), [source], to, "rn", lambda a: a)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("to", ["f32", "f16"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integer_is_rounded_once(source: str, to: str, rounding: str) -> None:
    width = int(source[1:])
    wide = np.random.default_rng(5).integers(0, 1 << 64, 300, dtype=np.uint64, endpoint=False)
    values = (wide >> np.arange(300, dtype=np.uint64) % np.uint64(width)).astype(
        f"{source[0]}{width // 8}".replace("s", "i")
    )
    found = evaluate(f"cvt.{rounding}.{to}.{source} %out, %a;", values, out=f"u{FORMATS[to].bits // 8}")
    assert found.tolist() == [encoded(Fraction(each), to, rounding) for each in values.tolist()]


@pytest.mark.parametrize(
    ("rounding", "meaning"), [("rni", round), ("rzi", int), ("rmi", math.floor), ("rpi", math.ceil)]
)
@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["f32", "f16", "f64"])
def test_float_becomes_an_integer_within_range(
    source: str, to: str, rounding: str, meaning: Callable[[Fraction], int]
) -> None:
    width = int(to[1:])
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    kind = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[source]
    values = np.concatenate(
        [np.arange(-300, 300, 0.25), [2.0**31, 2.0**32, -(2.0**31), 2.0**63, 2.0**64, 0.5 - 2**-30]]
    )
    with np.errstate(over="ignore"):
        values = values.astype(kind)[-1000:]
    values = values[np.isfinite(values)]
    register = max(width, 16)
    found = evaluate(f"cvt.{rounding}.{to}.{source} %out, %a;", values, out=f"u{register // 8}")
    expected = [min(max(meaning(Fraction(float(x))), low), high) % (1 << register) for x in values]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [("s32.f32", 0), ("u32.f32", 0), ("u16.f32", 0), ("s64.f32", 1 << 63), ("u64.f32", 1 << 63), ("s32.f64", 1 << 31)],
)
def test_nan_becomes_the_integer_the_isa_names(opcode: str, expected: int) -> None:
    to, source = opcode.split(".")
    values = np.full(32, np.nan, f"f{int(source[1:]) // 8}")
    assert evaluate(f"cvt.rni.{opcode} %out, %a;", values, out=f"u{int(to[1:]) // 8}")[0] == expected


def test_infinity_becomes_the_end_of_the_range() -> None:
    values = np.array([np.inf, -np.inf] * 16, np.float32)
    assert evaluate("cvt.rni.s32.f32 %out, %a;", values, out=np.int32)[:2].tolist() == [2**31 - 1, -(2**31)]


def test_two_halves_are_packed_the_first_on_top() -> None:
    a, b = np.arange(64, dtype=np.float32), -np.arange(64, dtype=np.float32)
    found = evaluate("cvt.rn.f16x2.f32 %out, %a, %b;", a, b, out=np.uint32).view(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(found, np.stack([b, a], 1).astype(np.float16))
    found = evaluate("cvt.rn.bf16x2.f32 %out, %a, %b;", a, b, out=np.uint32).view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(found, np.stack([b, a], 1).view(np.uint32) >> 16)


def test_integers_are_clamped_and_packed() -> None:
    a, b = np.arange(-200, 200, dtype=np.int32), np.arange(200, -200, -1, dtype=np.int32)
    c = np.arange(400, dtype=np.uint32) * np.uint32(2654435761)
    found = evaluate("cvt.pack.sat.s8.s32.b32 %out, %a, %b, %c;", a, b, c, out=np.uint32)
    low = [np.clip(each, -128, 127).astype(np.int8).view(np.uint8).astype(np.uint32) for each in (b, a)]
    np.testing.assert_array_equal(found, low[0] | low[1] << np.uint32(8) | c << np.uint32(16))
    found = evaluate("cvt.sat.s8.s32 %r4, %a; cvt.u32.s8 %out, %r4;", a, out=np.int32)
    np.testing.assert_array_equal(found, np.clip(a, -128, 127))


@pytest.mark.parametrize(("to", "dtype"), [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)])
def test_integer_is_cut_and_extended(to: str, dtype: type) -> None:
    values = np.arange(-600, 400, dtype=np.int32)
    found = evaluate(f"cvt.s32.{to} %out, %a;", values, out=np.int32)
    np.testing.assert_array_equal(found, values.astype(dtype).astype(np.int32))
    found = evaluate(f"cvt.s64.{to} %out, %a;", values, out=np.int64)
    np.testing.assert_array_equal(found, values.astype(dtype).astype(np.int64))


def test_rounding_to_integral_keeps_the_type() -> None:
    values = np.arange(-5, 5, 0.25, dtype=np.float32)
    for rounding, meaning in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        found = evaluate(f"cvt.{rounding}.f32.f32 %out, %a;", values, out=np.float32)
        np.testing.assert_array_equal(found, meaning(values))
