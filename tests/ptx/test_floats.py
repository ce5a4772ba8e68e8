"""Floating-point instructions against exact fractions, rounded by the book (IEEE 754, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from tests.ptx import Memory, execute
from tests.ptx.snippets import HEADER, evaluate, kernel
from tests.ptx.toolchain import require_valid


class Format(NamedTuple):
    """A binary format: bits of its significand (the hidden one too), largest exponent, all bits, the hardware's NaN."""

    precision: int
    largest_exponent: int
    bits: int
    nan: int


FORMATS = {
    "f16": Format(11, 15, 16, 0x7FFF), "bf16": Format(8, 127, 16, 0x7FFF), "f32": Format(24, 127, 32, 0x7FFFFFFF),
    "f64": Format(53, 1023, 64, 0x7FF8000000000000),
}  # fmt: skip
ROUNDINGS = ["rn", "rz", "rm", "rp"]
EXACT = Callable[..., Fraction]


def decoded(bits: int, kind: str) -> Fraction | str:
    """The number, or "inf", "-inf", "nan"."""
    precision, largest, n_bits, _ = FORMATS[kind]
    sign, magnitude = -1 if bits >> (n_bits - 1) else 1, bits & ((1 << (n_bits - 1)) - 1)
    exponent, rest = magnitude >> (precision - 1), magnitude & ((1 << (precision - 1)) - 1)
    if exponent == 2 * largest + 1:
        return "nan" if rest else "inf" if sign > 0 else "-inf"
    significand = rest + (1 << (precision - 1) if exponent else 0)
    return sign * Fraction(significand) * Fraction(2) ** (max(exponent, 1) - largest - precision + 1)


def encoded(exact: Fraction, kind: str, rounding: str, zero_is_negative: bool = False) -> int:
    """The bits of the number rounded once."""
    precision, largest, n_bits, _ = FORMATS[kind]
    sign = 1 << (n_bits - 1)
    if exact == 0:
        return sign if zero_is_negative else 0
    magnitude, negative = abs(exact), exact < 0
    exponent = max(_floor_log2(magnitude), 1 - largest)
    scaled = magnitude / Fraction(2) ** (exponent - precision + 1)
    whole, rest = scaled.numerator // scaled.denominator, scaled - scaled.numerator // scaled.denominator
    half = Fraction(1, 2)
    is_up = {
        "rn": rest > half or (rest == half and whole & 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[rounding]
    # A carry out of the significand grows the exponent, in the bits as in the number.
    bits = whole + bool(is_up) + ((exponent + largest - 1) << (precision - 1))
    infinity = (2 * largest + 1) << (precision - 1)
    if bits >= infinity:
        is_infinite = rounding == "rn" or rounding == ("rm" if negative else "rp")
        bits = infinity if is_infinite else infinity - 1
    return bits | (sign if negative else 0)


def _floor_log2(value: Fraction) -> int:
    estimate = value.numerator.bit_length() - value.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= value else estimate - 1


def draws(kind: str, n_columns: int, n: int = 300) -> list[np.ndarray]:
    """Finite numbers of all sizes, many of them near each other, many near powers of two, some zero."""
    fmt, generator = FORMATS[kind], np.random.default_rng(len(kind) + n_columns)
    top = (2 * fmt.largest_exponent + 1) << (fmt.precision - 1)
    columns = []
    for _ in range(n_columns):
        anything = generator.integers(0, top, n, dtype=np.uint64)
        around_one = (
            (np.uint64(fmt.largest_exponent) << np.uint64(fmt.precision - 1))
            + generator.integers(0, 1 << (fmt.precision + 3), n, dtype=np.uint64)
            - np.uint64(1 << (fmt.precision + 1))
        )
        # A significand of few bits makes ties.
        coarse = around_one >> np.uint64(fmt.precision // 2) << np.uint64(fmt.precision // 2)
        tiny = generator.integers(0, 3 << (fmt.precision - 1), n, dtype=np.uint64)
        chosen = np.choose(generator.integers(0, 4, n), [anything, around_one, coarse, tiny])
        sign = generator.integers(0, 2, n, dtype=np.uint64) << np.uint64(fmt.bits - 1)
        columns.append((chosen | sign).astype(f"u{fmt.bits // 8}"))
    return columns


def check(body: str, columns: list[np.ndarray], sources: list[str], result: str, rounding: str, exact: EXACT) -> None:
    found = evaluate(body, *columns, out=f"u{FORMATS[result].bits // 8}")
    for row, got in zip(zip(*(each.tolist() for each in columns), strict=True), found.tolist(), strict=True):
        values = [decoded(bits, kind) for bits, kind in zip(row, sources, strict=True)]
        value = exact(*values)
        expected = encoded(value, result, rounding, zero_is_negative=bool(got >> (FORMATS[result].bits - 1)))
        assert got == expected, f"{body} of {[hex(each) for each in row]}: {got:#x}, expected {expected:#x}"


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


def test_rounding_to_integral_keeps_the_type() -> None:
    values = np.arange(-5, 5, 0.25, dtype=np.float32)
    for rounding, meaning in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        found = evaluate(f"cvt.{rounding}.f32.f32 %out, %a;", values, out=np.float32)
        np.testing.assert_array_equal(found, meaning(values))


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


def test_ptxas_takes_every_instruction_tested_here() -> None:
    cases = [(f"{name}.{rounding}", kind, kind, n) for name, n, _ in ARITHMETIC for kind, rounding in KINDS]
    cases += [(f"{op}{nan}", kind, kind, 2) for op in ("min", "max") for nan in ("", ".NaN") for kind in FORMATS]
    cases += [(f"cvt.{rounding}.{to}", source, to, 1) for source, to, rounding in NARROWINGS]
    cases += [("cvt.f32", "bf16", "f32", 1), ("copysign", "f32", "f32", 2), ("div.full", "f32", "f32", 2)]
    cases += [("cvt.rn.f16x2", "f32", "f32", 2), ("cvt.rn.bf16x2", "f32", "f32", 2)]
    cases += [(f"{op}", "f32", "f32", 1) for op in ("rcp.rn", "sqrt.rn", "rcp.approx.ftz", "cvt.rni.f32", "neg.ftz")]
    cases += [(f"cvt.rni.{to}", "f32", "f32", 1) for to in ("s32", "u32")]
    # Of f64, min and max have no NaN form.
    kernels = [
        kernel(
            f"{opcode}.{source} %out, {', '.join(['%a', '%b', '%c'][:n])};",
            [FORMATS[source].bits // 8] * n,
            FORMATS[result].bits // 8,
            f"case{i}",
        )
        for i, (opcode, source, result, n) in enumerate(cases)
        if not (source == "f64" and "NaN" in opcode)
    ]
    require_valid(HEADER + "\n".join(kernels), (9, 0))
