"""Which function an arithmetic, logic or comparison opcode stands for. `pure(opcode)` knows all that have no effect but
their one result; everything it does not know exactly is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import floats, integers
from tests.tools.ptx.conversions import conversion
from tests.tools.ptx.integers import Pure, bits
from tests.tools.ptx.operands import TYPES

Array = npt.NDArray[Any]

_BITWISE: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_INTEGERS = {f"{sign}{n}" for sign in "us" for n in (16, 32, 64)}
_BARE = {f"b{n}" for n in (16, 32, 64)}
_PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}
_APPROXIMATE: dict[str, Callable[..., Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x), "div": lambda x, y: x / y,
}  # fmt: skip


def pure(opcode: str) -> Pure | None:
    """What an opcode computes; None if it is none of these."""
    base, *modifiers = opcode.split(".")
    if base in ("cvt", "cvta"):
        return conversion(opcode) if base == "cvt" else None
    if not modifiers:
        return None
    kind = modifiers[-1]
    if kind in floats.FLOAT_TYPES or kind in _PAIRS:
        return _float(base, modifiers[:-1], kind)
    return _integer(base, modifiers[:-1], kind)


def _integer(base: str, modifiers: list[str], kind: str) -> Pure | None:
    parts = [base, *modifiers, kind]
    if base in ("mul", "mad") and kind in _INTEGERS and len(modifiers) == 1:
        multiply, result = integers.product(parts)
        if base == "mul":
            return Pure(multiply, (kind, kind), result)
        return Pure(lambda a, b, c: multiply(a, b) + c, (kind, kind, result), result)
    if base in ("mul24", "mad24") and modifiers == ["lo"]:
        return _product_of_24_bits(base, kind)
    if base == "shf" and len(modifiers) == 2 and modifiers[0] in "lr" and modifiers[1] in ("clamp", "wrap"):
        is_left, is_clamped = modifiers[0] == "l", modifiers[1] == "clamp"
        shift = lambda low, high, amount: integers.funnel_shift(low, high, amount, is_left, is_clamped)  # noqa: E731
        return Pure(shift, ("b32", "b32", "u32"), "b32")
    if base == "prmt" and modifiers == ["b32"]:
        # The mode, if there is one, follows the type.
        permute = lambda a, b, selector: integers.permute_bytes(a, b, selector, kind)  # noqa: E731
        return Pure(permute, ("b32", "b32", "b32"), "b32")
    if base == "dp4a" and len(modifiers) == 1:
        kinds = [modifiers[0], kind]
        result = "s32" if "s32" in kinds else "u32"
        dot = lambda a, b, c: integers.dot_product(a, b, c, kinds, 4).view(TYPES[result])  # noqa: E731
        return Pure(dot, ("b32", "b32", result), result)
    if base in ("add", "sub") and modifiers == ["sat"] and kind == "s32":
        return Pure(integers.saturated(np.add if base == "add" else np.subtract), (kind, kind), kind)
    if base == "bfind" and modifiers == ["shiftamt"]:
        return Pure(lambda a: integers.find_top_bit(a, kind, True), (kind,), "u32")
    return None if modifiers else _integer_without_modifiers(base, kind)


def _integer_without_modifiers(base: str, kind: str) -> Pure | None:
    """Opcodes of the form `base.kind`."""
    one, two = (kind,), (kind, kind)
    if kind == "pred":
        known = {**_BITWISE, "not": np.logical_not}
        return Pure(known[base], one if base == "not" else two, kind) if base in known else None
    if kind in ("u16x2", "s16x2"):
        by_pair: dict[str, Callable[..., Array]] = {"min": np.minimum, "max": np.maximum, "add": np.add}
        return Pure(integers.pairwise(by_pair[base], kind), two, kind) if base in by_pair else None
    if kind in _INTEGERS:
        arithmetic: dict[str, Callable[..., Array]] = {
            "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": integers.divide,
            "rem": integers.remainder,
        }  # fmt: skip
        if base in arithmetic:
            return Pure(arithmetic[base], two, kind)
        single: dict[str, Callable[..., Array]] = {"neg": np.negative, "abs": np.abs}
        if base in single and kind[0] == "s":
            return Pure(single[base], one, kind)
        if base == "sad":
            distance = lambda a, b, c: c + np.where(a > b, a - b, b - a)  # noqa: E731
            return Pure(distance, (kind, kind, kind), kind)
        if base == "bfe" and bits(kind) >= 32:
            return Pure(lambda a, b, c: integers.extract_field(a, b, c, kind), (kind, "u32", "u32"), kind)
        if base == "bfind" and bits(kind) >= 32:
            return Pure(lambda a: integers.find_top_bit(a, kind, False), one, "u32")
        if base == "shr":
            return Pure(lambda a, b: integers.shift_right(a, b, kind), (kind, "u32"), kind)
    return _bit_pattern(base, kind) if kind in _BARE else None


def _bit_pattern(base: str, kind: str) -> Pure | None:
    one, two = (kind,), (kind, kind)
    if base in _BITWISE:
        return Pure(_BITWISE[base], two, kind)
    if base in ("not", "cnot"):
        return Pure(np.invert if base == "not" else lambda a: (a == 0).astype(TYPES[kind]), one, kind)
    if base in ("shl", "shr"):
        shift = integers.shift_left if base == "shl" else integers.shift_right
        return Pure(lambda a, b: shift(a, b, kind), (kind, "u32"), kind)
    if bits(kind) < 32:
        return None
    if base == "popc":
        return Pure(lambda a: np.bitwise_count(a).astype(np.uint32), one, "u32")
    if base == "clz":
        return Pure(lambda a: integers.leading_zeros(a, kind), one, "u32")
    if base == "brev":
        return Pure(lambda a: integers.reverse_bits(a, kind), one, kind)
    if base == "bfi":
        insert = lambda a, b, c, d: integers.insert_field(a, b, c, d, kind)  # noqa: E731
        return Pure(insert, (kind, kind, "u32", "u32"), kind)
    if base == "prmt" and kind == "b32":
        return Pure(lambda a, b, c: integers.permute_bytes(a, b, c, ""), ("b32", "b32", "b32"), "b32")
    return None


def _product_of_24_bits(base: str, kind: str) -> Pure:
    def cut(value: Array) -> Array:
        return (value << TYPES[kind](8)) >> TYPES[kind](8)

    if base == "mul24":
        return Pure(lambda a, b: cut(a) * cut(b), (kind, kind), kind)
    return Pure(lambda a, b, c: cut(a) * cut(b) + c, (kind, kind, kind), kind)


def _float(base: str, modifiers: list[str], kind: str) -> Pure | None:
    left = [each for each in modifiers if each not in ("ftz", "sat")]
    is_flushed, is_saturated = "ftz" in modifiers, "sat" in modifiers
    single = _PAIRS.get(kind, kind)
    found = _float_function(base, left, single)
    if found is None:
        return None
    function, n_sources, is_approximate = found

    def finished(*values: Array) -> Array:
        if is_flushed:
            values = tuple(floats.flush(each, single) for each in values)
        result = function(*values)
        if is_saturated:
            result = floats.saturate(result, single)
        return floats.flush(result, single) if is_flushed else result

    whole = integers.pairwise(finished, kind) if kind in _PAIRS else finished
    return Pure(whole, (kind,) * n_sources, kind, is_approximate)


def _float_function(base: str, modifiers: list[str], kind: str) -> tuple[Callable[..., Array], int, bool] | None:
    """The function, its number of sources, and whether the hardware only approximates it."""
    if base in ("min", "max") and (not modifiers or (modifiers == ["NaN"] and kind != "f64")):
        is_larger, nan = base == "max", bool(modifiers)
        return lambda a, b: floats.smaller_or_larger(a, b, kind, is_larger, nan), 2, False
    if not modifiers and base in ("abs", "neg"):
        return (lambda a: floats.absolute(a, kind) if base == "abs" else floats.negative(a, kind)), 1, False
    if not modifiers and base == "copysign":
        return lambda a, b: floats.copy_sign(a, b, kind), 2, False
    if base in _APPROXIMATE and modifiers in (["approx"], ["full"]):
        n_sources = 2 if base == "div" else 1
        formula = _APPROXIMATE[base]
        return (
            (lambda *x: floats.narrow(formula(*[floats.widen(each, kind) for each in x]), kind, "rn")),
            n_sources,
            True,
        )
    rounding = modifiers[0] if modifiers else "rn"
    if len(modifiers) > 1 or rounding not in floats.ROUNDINGS or (kind == "f64" and rounding != "rn"):
        return None
    known: dict[str, tuple[Callable[..., Array], int]] = {
        "add": (lambda a, b: floats.add(a, b, kind, rounding), 2),
        "sub": (lambda a, b: floats.add(a, floats.negative(b, kind), kind, rounding), 2),
        "mul": (lambda a, b: floats.multiply(a, b, kind, rounding), 2),
        "fma": (lambda a, b, c: floats.fused_multiply_add(a, b, c, kind, rounding), 3),
        "mad": (lambda a, b, c: floats.fused_multiply_add(a, b, c, kind, rounding), 3),
    }
    if kind in ("f32", "f64") and modifiers == ["rn"]:
        known |= {
            "div": (lambda a, b: floats.divide(a, b, kind), 2),
            "rcp": (lambda a: floats.divide(TYPES[kind](1), a, kind), 1),
            "sqrt": (lambda a: floats.square_root(a, kind), 1),
        }
    return (*known[base], False) if base in known else None
