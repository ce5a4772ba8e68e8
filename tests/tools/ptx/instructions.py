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

from tests.tools.ptx import access, predicates, warp
from tests.tools.ptx.arithmetic import pure
from tests.tools.ptx.integers import Pure, bits, logic3, product
from tests.tools.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, Fault
from tests.tools.ptx.operands import TYPES, Reader, Scope, Step, integer, listed, unknown, width_bytes
from tests.tools.ptx.parser import Instruction, PtxSyntaxError
from tests.tools.ptx.threads import Threads

Array = npt.NDArray[Any]

_WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


class Control(Enum):
    """What happens to the threads that have executed an instruction."""

    NEXT = "go on"
    BRANCH = "go on at the target"
    EXIT = "end"
    BARRIER = "wait for the block"
    WARP = "wait for the threads in the membermask, then execute and go on"


class Operation(NamedTuple):
    """A decoded instruction; `guard` reads the predicate that lets a thread execute, `exchange` is a warp's."""

    source: Instruction
    control: Control
    step: Step | None
    guard: Reader | None
    target: int = -1
    exchange: warp.Exchange | None = None
    is_approximate: bool = False


def decode(instruction: Instruction, scope: Scope, labels: dict[str, int]) -> Operation:
    """Decode one instruction of a function. Raises NotImplementedError for any that is not known exactly."""
    try:
        return _decode(instruction, scope, labels)
    except PtxSyntaxError as error:
        raise PtxSyntaxError(f"line {instruction.line}: {instruction.text}: {error}") from error
    except (NotImplementedError, KeyError, IndexError, ValueError) as error:
        raise unknown(instruction) from error


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
        step = _reduce_at_barrier(instruction, scope, parts) if "red" in parts else None
        known = {"bar", "barrier", "cta", "aligned", *(("red", *parts[-3:]) if step else ("sync",))}
        if not set(parts) <= known or (not step and ("sync" not in parts or len(instruction.operands) != 1)):
            raise unknown(instruction)
        return Operation(instruction, Control.BARRIER, step, guard)
    if exchange := warp.exchange(instruction, scope):
        if guard:
            raise unknown(instruction)
        return Operation(instruction, Control.WARP, None, None, exchange=exchange)
    step, is_approximate = _step(instruction, scope, parts)
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


def _logic3(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    if parts[1:] != ["b32"] or len(instruction.operands) != 5:
        return None
    write, readers = (
        scope.write(instruction.operands[0], "b32"),
        [scope.read(x, "b32") for x in instruction.operands[1:4]],
    )
    table = integer(instruction.operands[4])
    return lambda threads: write(threads, logic3(*[read(threads) for read in readers], table))


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


def _no_effect(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    return None if "proxy" in instruction.opcode else lambda threads: None


def _reduce_at_barrier(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    """bar.red: how many threads of the block bring a true predicate, or whether any or all do."""
    operation = next((part for part in parts if part in ("popc", "and", "or")), "")
    kind = "u32" if operation == "popc" else "pred"
    if not operation or parts[-1] != kind or len(instruction.operands) != 3:
        raise unknown(instruction)
    read, write = scope.read(instruction.operands[2], "pred"), scope.write(instruction.operands[0], kind)

    def step(threads: Threads) -> None:
        votes = np.broadcast_to(read(threads), threads.n) & threads.active.mask
        yes, all_ = (
            np.bincount(threads.row[mask], minlength=threads.n_blocks) for mask in (votes, threads.active.mask)
        )
        results = {"popc": yes.astype(np.uint32), "or": yes > 0, "and": yes == all_}
        write(threads, results[operation][threads.row])

    return step


def _trap(instruction: Instruction, scope: Scope, parts: list[str]) -> Step | None:
    def step(threads: Threads) -> None:
        raise Fault("trap")

    return step


_SPECIAL: dict[str, Callable[[Instruction, Scope, list[str]], Step | None]] = {
    "mov": _move,
    "cvta": _convert_address,
    "isspacep": _is_in_space,
    **dict.fromkeys(("setp", "set"), predicates.set_predicate),
    **dict.fromkeys(("selp", "slct"), predicates.select),
    "lop3": _logic3,
    "testp": predicates.test_property,
    **dict.fromkeys(("add", "addc", "sub", "subc", "mad", "madc"), _with_carry),
    "trap": _trap,
    **dict.fromkeys(("membar", "fence", "nanosleep"), _no_effect),
}
