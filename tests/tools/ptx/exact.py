"""IEEE 754 in exact fractions: what a floating-point instruction has to give."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tests.tools.ptx.snippets import evaluate

ROUNDINGS = ["rn", "rz", "rm", "rp"]
EXACT = Callable[..., Fraction]


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
