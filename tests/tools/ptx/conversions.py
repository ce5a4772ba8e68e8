"""cvt: every conversion between integers and floating-point numbers of 8 to 64 bits, in all rounding directions.

A float becomes an integer clamped to the integer's range; NaN becomes 0, or only the top bit where one of the two types
has 64 bits. PTX ISA, section "cvt".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import floats
from tests.tools.ptx.integers import Pure, bits
from tests.tools.ptx.operands import TYPES

Array = npt.NDArray[Any]

_TO_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip
_MODIFIERS = {"sat", "ftz", "relu", *_TO_INTEGRAL, *floats.ROUNDINGS}


def conversion(opcode: str) -> Pure | None:
    """What `cvt...` computes; None if it is not known here."""
    _, *modifiers, to, source = opcode.split(".")
    if modifiers[:1] == ["pack"]:
        return _pack(modifiers, to, source)
    if not set(modifiers) <= _MODIFIERS or "relu" in modifiers:
        return None
    if to in ("f16x2", "bf16x2"):
        return _pair(modifiers, to, source)
    is_known = all(kind in floats.FLOAT_TYPES or kind[0] in "us" for kind in (to, source)) and {to, source} <= set(
        TYPES
    )
    if not is_known or "x2" in to + source:
        return None
    convert = _function(modifiers, to, source)
    return Pure(convert, (source,), to) if convert else None


def _function(modifiers: list[str], to: str, source: str) -> Callable[[Array], Array] | None:
    to_float, from_float = to in floats.FLOAT_TYPES, source in floats.FLOAT_TYPES
    is_flushed, is_saturated = "ftz" in modifiers, "sat" in modifiers
    rounding = next((each for each in modifiers if each in floats.ROUNDINGS), "")
    integral = next((_TO_INTEGRAL[each] for each in modifiers if each in _TO_INTEGRAL), None)
    if not to_float and not from_float:
        return (lambda a: clamp_integer(a, to)) if is_saturated else (lambda a: a.astype(TYPES[to]))
    if not to_float:
        if integral is None:
            return None
        return lambda a: to_integer(integral(floats.widen(_flushed(a, source, is_flushed), source)), to, source)
    if not from_float:
        if not rounding or (to == "f64" and rounding != "rn"):
            return None
        return lambda a: _saturated(from_integer(a, source, to, rounding), to, is_saturated)
    is_narrowing = bits(to) < bits(source) or {to, source} == {"f16", "bf16"}
    if is_narrowing != bool(rounding) or (integral is not None and to != source):
        return None

    def between_floats(value: Array) -> Array:
        wide = floats.widen(_flushed(value, source, is_flushed), source)
        if integral is not None:
            wide = integral(wide)
        result = _saturated(floats.narrow(wide, to, rounding or "rn"), to, is_saturated)
        return floats.flush(result, to) if is_flushed and to == "f32" else result

    return between_floats


def _flushed(value: Array, kind: str, is_flushed: bool) -> Array:
    return floats.flush(value, kind) if is_flushed and kind == "f32" else value


def _saturated(value: Array, kind: str, is_saturated: bool) -> Array:
    return floats.saturate(value, kind) if is_saturated else value


def to_integer(wide: Array, to: str, source: str) -> Array:
    """Integral float64 values to integers, clamped."""
    limits = np.iinfo(TYPES[to])
    below, above = wide <= float(limits.min), wide >= float(limits.max)
    nan = np.isnan(wide)
    inside = np.where(below | above | nan, 0.0, wide).astype(TYPES[to])
    result = np.where(above, TYPES[to](limits.max), np.where(below, TYPES[to](limits.min), inside))
    for_nan = 1 << (bits(to) - 1) if source == "f64" or bits(to) == 64 else 0
    pattern = TYPES[f"u{bits(to)}"](for_nan).view(TYPES[to])
    return np.where(nan, pattern, result).astype(TYPES[to])


def from_integer(value: Array, source: str, to: str, rounding: str) -> Array:
    """Integers to floats, rounded once."""
    if bits(source) < 64:
        return floats.narrow(value.astype(np.float64), to, rounding)
    if rounding == "rn" and to in ("f32", "f64"):
        return value.astype(TYPES[to])
    # Both halves are exact in float64, and so is the error of their sum.
    high, low = (value >> TYPES[source](32)).astype(np.float64), (value & TYPES[source](0xFFFFFFFF)).astype(np.float64)
    return floats.narrow(floats.add_to_odd(high * 2.0**32, low), to, rounding)


def clamp_integer(value: Array, to: str) -> Array:
    limits, own = np.iinfo(TYPES[to]), np.iinfo(value.dtype)
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return np.clip(value, value.dtype.type(low), value.dtype.type(high)).astype(TYPES[to])


def _pair(modifiers: list[str], to: str, source: str) -> Pure | None:
    """cvt.rn.f16x2.f32 d, a, b: a in the upper half."""
    if source != "f32" or modifiers not in (["rn"], ["rz"]):
        return None
    kind, rounding = to.removesuffix("x2"), modifiers[0]

    def pack(high: Array, low: Array) -> Array:
        halves = [
            floats.bits_of(floats.narrow(floats.widen(each, "f32"), kind, rounding), kind) for each in (high, low)
        ]
        return (halves[0].astype(np.uint32) << np.uint32(16)) | halves[1]

    return Pure(pack, ("f32", "f32"), to)


def _pack(modifiers: list[str], to: str, source: str) -> Pure | None:
    """cvt.pack.sat.TO.s32{.b32} d, a, b{, c}: a and b clamped to TO, a above b; c moves up above them."""
    if modifiers[:2] != ["pack", "sat"]:
        return None
    if modifiers[2:] and source == "b32" and to == "s32" and modifiers[2] in ("s8", "u8"):
        kind, has_rest = modifiers[2], True
    elif not modifiers[2:] and source == "s32" and to in ("s16", "u16"):
        kind, has_rest = to, False
    else:
        return None
    mask, width = np.uint32((1 << bits(kind)) - 1), np.uint32(bits(kind))

    def pack(a: Array, b: Array, c: Array | None = None) -> Array:
        high, low = (clamp_integer(each, kind).astype(np.uint32) & mask for each in (a, b))
        both = (high << width) | low
        return both if c is None else both | (c << np.uint32(2 * width))

    return Pure(pack, ("s32", "s32", "b32") if has_rest else ("s32", "s32"), "b32")
