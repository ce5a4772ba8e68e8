"""Floating point as the hardware rounds it: once, in the asked direction, for f16, bf16, f32 and f64.

f16 values are float16 arrays, bf16 values uint16 bit patterns, f32 and f64 their NumPy types. A result in a narrow type
is computed in float64 with its error, rounded *to odd* there, and only then to the narrow type: 53 bits are at least
two more than it has, so that the second rounding is the only one that shows (Boldo and Melquiond, 2008).

A NaN result is the one NaN the hardware makes: 0x7fffffff, or 0x7fff in 16 bits; of f64 the payload is not specified.
Where a result is rounded up to the smallest normal number, `ftz` here keeps it; the hardware may look before rounding.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOAT_TYPES = ("f16", "bf16", "f32", "f64")
ROUNDINGS = ("rn", "rz", "rm", "rp")
_BITS: dict[str, type] = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FF8000000000000}
_INFINITY = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000, "f64": 0x7FF0000000000000}
_SMALLEST_NORMAL = {"f16": 0x0400, "bf16": 0x0080, "f32": 0x00800000, "f64": 0x0010000000000000}
_SIGN = {"f16": 0x8000, "bf16": 0x8000, "f32": 0x80000000, "f64": 0x8000000000000000}


def bits_of(value: Array, kind: str) -> Array:
    """A typed value's bit pattern."""
    return np.asarray(value).view(_BITS[kind])


def from_bits(bits: Array, kind: str) -> Array:
    if kind == "bf16":
        return bits
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])


def widen(value: Array, kind: str) -> Array:
    """The value in float64, exactly."""
    if kind == "bf16":
        return (np.asarray(value).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return np.asarray(value).astype(np.float64)


def is_nan(value: Array, kind: str) -> Array:
    magnitude = bits_of(value, kind) & _BITS[kind](_SIGN[kind] - 1)
    nan: Array = magnitude > _INFINITY[kind]
    return nan


def canonical(value: Array, kind: str) -> Array:
    """The value, every NaN replaced by the hardware's."""
    nan = is_nan(value, kind)
    if not nan.any():
        return value
    return from_bits(np.where(nan, _BITS[kind](_NAN[kind]), bits_of(value, kind)), kind)


def flush(value: Array, kind: str) -> Array:
    """Subnormal numbers replaced by zero of their sign."""
    bits = bits_of(value, kind)
    sign = bits & _BITS[kind](_SIGN[kind])
    is_small = (bits ^ sign) < _SMALLEST_NORMAL[kind]
    return from_bits(np.where(is_small, sign, bits), kind)


def saturate(value: Array, kind: str) -> Array:
    """The value clamped to [0, 1]; NaN and -0 become +0."""
    wide = widen(value, kind)
    return narrow(np.where(wide > 0, np.minimum(wide, 1.0), 0.0), kind, "rn")


def narrow(wide: Array, kind: str, rounding: str) -> Array:
    """A float64 rounded once to `kind`; for numbers that float64 itself had to round, it must be rounded to odd."""
    wide = np.asarray(wide, np.float64)
    if kind == "f64":
        return canonical(wide, kind)
    nearest = canonical(_nearest(wide, kind), kind)
    if rounding == "rn":
        return nearest
    bits, got = bits_of(nearest, kind), widen(nearest, kind)
    sign = (bits & _BITS[kind](_SIGN[kind])) != 0
    too_high, too_low = got > wide, got < wide
    # Bit patterns are sign and magnitude: one less is one step towards zero.
    down = too_high & {"rz": ~sign, "rm": np.True_, "rp": np.False_}[rounding]
    up = too_low & {"rz": sign, "rm": np.False_, "rp": np.True_}[rounding]
    step = np.where(down, np.where(sign, 1, -1), np.where(up, np.where(sign, -1, 1), 0))
    return from_bits((bits.astype(np.int64) + step).astype(_BITS[kind]), kind)


def _nearest(wide: Array, kind: str) -> Array:
    if kind == "f16":
        return wide.astype(np.float16)
    single = wide.astype(np.float32)
    if kind == "f32":
        return single
    # To float32 towards odd, then to its upper 16 bits, ties to even.
    bits, back = single.view(np.uint32), single.astype(np.float64)
    is_inexact = np.isfinite(back) & (back != wide)
    is_too_large = is_inexact & (np.abs(back) > np.abs(wide))
    bits = np.where(is_inexact, (bits - is_too_large.astype(np.uint32)) | np.uint32(1), bits)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(wide), np.uint32(_NAN[kind]), rounded).astype(np.uint16)


def add_to_odd(a: Array, b: Array) -> Array:
    """a + b of float64 values, rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return to_odd(total, error)


def _signed_zero(a: Array, b: Array, rounding: str) -> Array:
    """`add_to_odd`, and downwards a sum of zero is -0 unless both are +0 (IEEE 754, 6.3)."""
    total = add_to_odd(a, b)
    if rounding != "rm":
        return total
    are_positive = ~np.signbit(a) & ~np.signbit(b)
    return np.where((total == 0) & ~are_positive, -0.0, total)


def to_odd(total: Array, error: Array) -> Array:
    is_even = (np.asarray(total).view(np.uint64) & np.uint64(1)) == 0
    is_moved = is_even & (error != 0) & np.isfinite(total) & np.isfinite(error)
    if not is_moved.any():
        return total
    return np.where(is_moved, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def add(a: Array, b: Array, kind: str, rounding: str) -> Array:
    """a + b, rounded once; of f64 only to nearest."""
    if kind == "f64" or (kind == "f32" and rounding == "rn"):
        return canonical(a + b, kind)
    return narrow(_signed_zero(widen(a, kind), widen(b, kind), rounding), kind, rounding)


def multiply(a: Array, b: Array, kind: str, rounding: str) -> Array:
    """a * b, rounded once."""
    if kind == "f64" or (kind == "f32" and rounding == "rn"):
        return canonical(a * b, kind)
    # Two significands of 24 bits make one of 48: exact in float64.
    return narrow(widen(a, kind) * widen(b, kind), kind, rounding)


def fused_multiply_add(a: Array, b: Array, c: Array, kind: str, rounding: str) -> Array:
    """a * b + c, rounded once."""
    if kind == "f64":
        exact = np.frompyfunc(_exact_fused, 3, 1)(a, b, c)
        return canonical(np.asarray(exact, np.float64), kind)
    return narrow(_signed_zero(widen(a, kind) * widen(b, kind), widen(c, kind), rounding), kind, rounding)


def divide(a: Array, b: Array, kind: str) -> Array:
    """a / b, rounded once, to nearest."""
    return canonical(a / b, kind)


def square_root(a: Array, kind: str) -> Array:
    return canonical(np.sqrt(a), kind)


def _exact_fused(a: float, b: float, c: float) -> float:
    if not np.isfinite([a, b, c]).all() or a * b + c == 0 == Fraction(a) * Fraction(b) + Fraction(c):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def smaller_or_larger(a: Array, b: Array, kind: str, is_larger: bool, propagates_nan: bool) -> Array:
    """min and max: -0 is less than +0; a NaN loses against a number, or wins with `propagates_nan`."""
    left, right = bits_of(a, kind), bits_of(b, kind)
    left_key, right_key = (_ordered(bits, kind) for bits in (left, right))
    chosen = np.where((left_key > right_key) == is_larger, left, right)
    left_nan, right_nan = is_nan(a, kind), is_nan(b, kind)
    if propagates_nan:
        chosen = np.where(left_nan | right_nan, _BITS[kind](_NAN[kind]), chosen)
    else:
        chosen = np.where(left_nan, right, np.where(right_nan, left, chosen))
    return canonical(from_bits(chosen.astype(_BITS[kind]), kind), kind)


def _ordered(bits: Array, kind: str) -> Array:
    """Bit patterns to unsigned integers in the numbers' order."""
    sign = _BITS[kind](_SIGN[kind])
    ordered: Array = np.where(bits & sign, ~bits, bits | sign)
    return ordered


def absolute(value: Array, kind: str) -> Array:
    return from_bits(bits_of(value, kind) & _BITS[kind](_SIGN[kind] - 1), kind)


def negative(value: Array, kind: str) -> Array:
    return from_bits(bits_of(value, kind) ^ _BITS[kind](_SIGN[kind]), kind)


def copy_sign(sign_of: Array, value: Array, kind: str) -> Array:
    sign = bits_of(sign_of, kind) & _BITS[kind](_SIGN[kind])
    return from_bits(bits_of(absolute(value, kind), kind) | sign, kind)
