"""Comparisons and what hangs on them: setp, set, selp, slct, testp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import floats
from tests.tools.ptx.operands import TYPES, Scope, Step
from tests.tools.ptx.parser import Instruction
from tests.tools.ptx.threads import Threads

Array = npt.NDArray[Any]

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _compare(name: str, kind: str) -> Callable[[Array, Array], Array] | None:
    is_float = kind in floats.FLOAT_TYPES
    name = _UNSIGNED_NAMES.get(name, name) if kind[0] == "u" else name
    is_also_nan = is_float and name.endswith("u")
    plain = name[:-1] if is_also_nan else name
    if plain not in _COMPARISONS and not (is_float and name in ("num", "nan")):
        return None

    def compare(a: Array, b: Array) -> Array:
        if not is_float:
            return _COMPARISONS[plain](a, b)
        unordered = floats.is_nan(a, kind) | floats.is_nan(b, kind)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        ordered = _COMPARISONS[plain](floats.widen(a, kind), floats.widen(b, kind)) & ~unordered
        return ordered | unordered if is_also_nan else ordered

    return compare


def set_predicate(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    """setp, and set, whose result is all ones or 1.0."""
    kind, is_flushed = parts[-1], "ftz" in parts
    result = "pred" if parts[0] == "setp" else parts[-2]
    modifiers = [part for part in parts[2 : -1 if result == "pred" else -2] if part != "ftz"]
    compare = _compare(parts[1], kind) if kind in TYPES and "x2" not in kind and kind != "pred" else None
    if compare is None or len(modifiers) > 1 or not set(modifiers) <= set(_JOINS):
        return None
    if result not in ("pred", "u32", "s32", "f32") or len(instruction.operands) != 3 + len(modifiers):
        return None
    target, opposite = (part.strip() for part in (instruction.operands[0] + "|_").split("|")[:2])
    write, write_opposite = scope.write(target, result), scope.write(opposite, "pred")
    left, right = (scope.read(operand, kind) for operand in instruction.operands[1:3])
    other = scope.read(instruction.operands[3], "pred") if modifiers else None
    join = _JOINS[modifiers[0]] if modifiers else np.logical_and

    def step(threads: Threads) -> None:
        a, b = left(threads), right(threads)
        if is_flushed:
            a, b = floats.flush(a, kind), floats.flush(b, kind)
        holds = compare(a, b)
        holds, fails = (each if other is None else join(each, other(threads)) for each in (holds, ~holds))
        if result == "pred":
            write(threads, holds)
            write_opposite(threads, fails)
        else:
            yes = np.float32(1) if result == "f32" else TYPES[result](-1 if result == "s32" else 0xFFFFFFFF)
            write(threads, np.where(holds, yes, TYPES[result](0)))

    return step


def select(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    """selp by a predicate, slct by a number's sign."""
    kind = parts[1]
    yes, no = (scope.read(operand, kind) for operand in instruction.operands[1:3])
    write = scope.write(instruction.operands[0], kind)
    if parts[0] == "selp" and len(parts) == 2:
        by = scope.read(instruction.operands[3], "pred")
        return lambda threads: write(threads, np.where(by(threads), yes(threads), no(threads)))
    if parts[0] == "slct" and parts[2:] in (["s32"], ["f32"], ["ftz", "f32"]):
        sign = scope.read(instruction.operands[3], parts[-1])
        return lambda threads: write(threads, np.where(sign(threads) >= 0, yes(threads), no(threads)))
    return None


def test_property(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    name, kind = parts[1:]
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
    }
    if name not in tests or kind not in ("f32", "f64"):
        return None
    read, write = scope.read(instruction.operands[1], kind), scope.write(instruction.operands[0], "pred")
    return lambda threads: write(threads, tests[name](read(threads)))
