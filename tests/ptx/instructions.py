"""From an instruction's text to what the interpreter does with it, once per kernel.

An instruction that no decoder knows exactly, modifiers included, raises NotImplementedError with its line; nothing is
guessed. Pure functions are in `arithmetic.py` and `conversions.py`, memory in `access.py`, warps in `warp.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.ptx import access, floats, warp
from tests.ptx.arithmetic import pure
from tests.ptx.integers import Pure, bits, product
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, Fault
from tests.ptx.operands import TYPES, Reader, Scope, Step, listed, unknown, width_bytes
from tests.ptx.parser import Instruction, PtxSyntaxError
from tests.ptx.threads import Threads

Array = npt.NDArray[Any]

_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOINS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip
_WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
_NO_EFFECT = {"membar", "fence", "nanosleep"}


class Control(Enum):
    """What happens to the threads that have executed an instruction."""

    NEXT = "go on"
    BRANCH = "go on at the target"
    EXIT = "end"
    BARRIER = "wait for the block"
    WARP = "wait for the threads in the membermask, then execute and go on"


class Operation(NamedTuple):
    """A decoded instruction; `members` reads the membermask, `guard` the predicate that lets a thread execute."""

    source: Instruction
    control: Control
    step: Step | None
    guard: Reader | None
    target: int = -1
    members: Reader | None = None
    is_approximate: bool = False


def decode(instruction: Instruction, scope: Scope, labels: dict[str, int]) -> Operation:
    """Decode one instruction of a function. Raises NotImplementedError for any that is not known exactly."""
    try:
        return _decode(instruction, scope, labels)
    except (PtxSyntaxError, KeyError, IndexError, ValueError) as error:
        raise PtxSyntaxError(f"line {instruction.line}: {instruction.text}: {error!r}") from error


def _decode(instruction: Instruction, scope: Scope, labels: dict[str, int]) -> Operation:
    parts = instruction.opcode.split(".")
    guard = None
    if instruction.guard:
        guard = scope.read(("!" if instruction.is_negated else "") + instruction.guard, "pred")
    if parts[0] == "bra":
        return Operation(instruction, Control.BRANCH, None, guard, target=labels[instruction.operands[0]])
    if parts[0] in ("ret", "exit"):
        return Operation(instruction, Control.EXIT, None, guard)
    if parts[0] in ("bar", "barrier") and "warp" not in parts:
        known = {"bar", "barrier", "cta", "sync", "aligned"}
        if not set(parts) <= known or "sync" not in parts or len(instruction.operands) != 1:
            raise unknown(instruction)
        return Operation(instruction, Control.BARRIER, None, guard)
    step, is_approximate = _step(instruction, scope, parts)
    if (mask := warp.membermask(instruction)) is not None:
        return Operation(
            instruction, Control.WARP, step, guard, members=scope.read(mask, "b32"), is_approximate=is_approximate
        )
    return Operation(instruction, Control.NEXT, step, guard, is_approximate=is_approximate)


def _step(instruction: Instruction, scope: Scope, parts: list[str]) -> tuple[Step, bool]:
    special = _SPECIAL.get(parts[0])
    if special and (step := special(instruction, scope, parts)):
        return step, False
    if step := access.decode(instruction, scope):
        return step, False
    if step := warp.decode(instruction, scope):
        return step, warp.is_approximate(instruction.opcode)
    if known := pure(instruction.opcode):
        return _pure_step(instruction, scope, known), known.is_approximate
    raise unknown(instruction)


def _pure_step(instruction: Instruction, scope: Scope, known: Pure) -> Step:
    if len(instruction.operands) != 1 + len(known.sources):
        raise unknown(instruction)
    readers = [scope.read(operand, kind) for operand, kind in zip(instruction.operands[1:], known.sources, strict=True)]
    write, function = scope.write(instruction.operands[0], known.result), known.function
    if instruction.opcode.split(".")[0] in ("div", "rem") and known.result[0] in "us":

        def divide(threads: Threads) -> None:
            a, b = (read(threads) for read in readers)
            if (zero := threads.active.mask & np.broadcast_to(b == 0, threads.n)).any():
                raise Fault("integer division by zero", lane=int(np.argmax(zero)))
            write(threads, function(a, b))

        return divide
    if len(readers) == 2:
        first, second = readers
        return lambda threads: write(threads, function(first(threads), second(threads)))
    return lambda threads: write(threads, function(*[read(threads) for read in readers]))


def _move(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    target, source = instruction.operands
    kind = parts[-1]
    if len(parts) != 2 or kind not in TYPES:
        return None
    if target.startswith("{"):
        return _unpack(listed(target), scope.read(source, f"b{bits(kind)}"), kind, scope)
    write = scope.write(target, kind)
    if source.startswith("{"):
        return _pack(listed(source), write, kind, scope)
    read = scope.read(source, kind)
    return lambda threads: write(threads, read(threads))


def _unpack(targets: list[str], read: Reader, kind: str, scope: Scope) -> Step:
    piece = f"b{bits(kind) // len(targets)}"
    writers = [scope.write(name, piece) for name in targets]

    def step(threads: Threads) -> None:
        value = read(threads)
        for i, write in enumerate(writers):
            write(threads, (value >> value.dtype.type(i * bits(piece))).astype(TYPES[piece]))

    return step


def _pack(sources: list[str], write: Callable[[Threads, Array], None], kind: str, scope: Scope) -> Step:
    piece, whole = f"b{bits(kind) // len(sources)}", f"b{bits(kind)}"
    readers = [scope.read(name, piece) for name in sources]

    def step(threads: Threads) -> None:
        word = TYPES[whole]
        value = readers[0](threads).astype(word)
        for i, read in enumerate(readers[1:], start=1):
            value = value | (read(threads).astype(word) << word(i * bits(piece)))
        write(threads, value.view(TYPES[kind]))

    return step


def _convert_address(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    """cvta: between a state space's own addresses and generic ones."""
    *to, space, kind = parts[1:]
    space = space.removesuffix("::cta")
    if to not in ([], ["to"]) or space not in _WINDOWS or kind != "u64":
        return None
    start = np.uint64(_WINDOWS[space])
    read, write = scope.read(instruction.operands[1], kind), scope.write(instruction.operands[0], kind)
    if to:
        return lambda threads: write(threads, read(threads) - start)
    return lambda threads: write(threads, read(threads) + start)


def _is_in_space(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    space = parts[-1].removesuffix("::cta")
    if len(parts) != 2 or space not in ("global", "shared", "local"):
        return None
    start = _WINDOWS[space]
    end = SHARED_WINDOW if space == "global" else 2 * start
    read, write = scope.read(instruction.operands[1], "u64"), scope.write(instruction.operands[0], "pred")

    def step(threads: Threads) -> None:
        address = read(threads)
        write(threads, (address >= np.uint64(start)) & (address < np.uint64(end)))

    return step


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


def _set_predicate(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
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


def _select(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
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


def _with_carry(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    """add.cc, addc, sub.cc, subc, mad.cc, madc: sums of more than one word, by a carry bit of each thread."""
    base, kind = parts[0], parts[-1]
    takes, sets = base in ("addc", "subc", "madc"), "cc" in parts
    if not (takes or sets):
        return None
    modes = [part for part in parts[1:-1] if part != "cc"]
    is_product = base.startswith("mad")
    if width_bytes(kind) < 4 or (len(modes) != 1 or modes[0] not in ("lo", "hi") if is_product else modes):
        return None
    multiply = product(["mad", *modes, kind])[0] if is_product else None
    readers = [scope.read(operand, kind) for operand in instruction.operands[1:]]
    write, word, is_difference = scope.write(instruction.operands[0], kind), TYPES[f"u{bits(kind)}"], base[0] == "s"

    def step(threads: Threads) -> None:
        values = [np.broadcast_to(read(threads), threads.n) for read in readers]
        if multiply:
            values = [multiply(*values[:2]), values[2]]
        a, b = (np.asarray(value).view(word) for value in values)
        carried = (threads.carry if takes else np.zeros(threads.n, bool)).astype(word)
        if is_difference:
            total = a - b - carried
            overflows = (a < b) | ((a == b) & (carried == 1))
        else:
            total = a + b + carried
            overflows = (total < a) | ((total == a) & (carried == 1))
        write(threads, total.view(TYPES[kind]))
        if sets:
            threads.carry = np.where(threads.active.mask, overflows, threads.carry)

    return step


def _test_property(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
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


def _no_effect(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    return None if "proxy" in instruction.opcode else lambda threads: None


def _synchronize_warp(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    def step(threads: Threads) -> None:
        threads.epoch = threads.epoch + threads.active.mask.reshape(-1, 32).any(axis=1)

    return step if parts[1:] == ["warp", "sync"] else None


def _trap(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    def step(threads: Threads) -> None:
        raise Fault("trap")

    return step


_SPECIAL: dict[str, Callable[[Instruction, Scope, list[str]], Step | None]] = {
    "mov": _move, "cvta": _convert_address, "isspacep": _is_in_space, "setp": _set_predicate, "set": _set_predicate,
    "selp": _select, "slct": _select, "testp": _test_property, "bar": _synchronize_warp, "trap": _trap,
    "membar": _no_effect, "fence": _no_effect, "nanosleep": _no_effect,
    **dict.fromkeys(("add", "addc", "sub", "subc", "mad", "madc"), _with_carry),
}  # fmt: skip
