"""Instructions that touch memory: ld, st, atom, red, cp.async, ldmatrix; each decoded to a step over the threads.

An atomic instruction is executed thread by thread, in the order of the threads; a sum of floats is therefore one of the
many that the hardware may give. cp.async reads its source when it is issued and writes when it is waited for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import floats
from tests.tools.ptx.memory import SHARED_WINDOW
from tests.tools.ptx.operands import TYPES, Reader, Scope, Step, listed, unknown, width_bytes
from tests.tools.ptx.parser import Instruction
from tests.tools.ptx.threads import REGISTER_TYPES, Threads
from tests.tools.ptx.warp import require_whole_warps

Array = npt.NDArray[Any]

_HINTS = {"volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "cta", "cluster", "gpu", "sys", "nc", "ca"}
_HINTS |= {
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "L1::no_allocate",
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
}
_HINTS |= {"L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last"}
_HINTS |= {"L2::evict_normal", "unified"}
_STRONG = {"volatile", "relaxed", "acquire", "release"}
_SPACES = {"global", "const", "shared", "local"}

_OPERATIONS = ("add", "and", "or", "xor", "min", "max", "exch", "cas", "inc", "dec")

_ACCUMULATED = {"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ACCUMULATED |= {"min": np.minimum, "max": np.maximum}


def _space_of(parts: list[str], named: str) -> str:
    """The state space of an access; shared::cta is shared, a variable's name tells its own."""
    if "param" in parts:  # of a call: what is the kernel's own was decoded before
        return "local"
    spaces = [part.removesuffix("::cta") for part in parts if part.removesuffix("::cta") in _SPACES]
    return spaces[0] if spaces else named or "generic"


def decode(instruction: Instruction, scope: Scope) -> Step | None:
    """The step of a memory instruction; None if it is none of them."""
    parts = instruction.opcode.split(".")
    if parts[0] in ("ld", "ldu") and "param" in parts and _base(instruction.operands[-1]) in scope.parameters:
        return _load_parameter(instruction, scope, parts)
    if parts[0] in ("ld", "ldu", "st"):
        return _load_or_store(instruction, scope, parts)
    if parts[0] in ("atom", "red") and "async" not in parts:
        return _atomic(instruction, scope, parts)
    if parts[:2] == ["cp", "async"]:
        return _copy(instruction, scope, parts)
    if parts[0] == "ldmatrix":
        return _load_matrix(instruction, scope, parts)
    if parts[0] in ("prefetch", "prefetchu"):
        return lambda threads: None
    return None


def _base(address: str) -> str:
    return address.strip("[] ").partition("+")[0].strip()


def _load_parameter(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    kind = parts[-1]
    if not set(parts[2:-1]) <= {"v2", "v4"}:
        raise unknown(instruction)
    inside = instruction.operands[1].strip("[] ").partition("+")[2]
    offset, width = scope.parameters[_base(instruction.operands[1])] + int(inside or 0), width_bytes(kind)
    writers = [scope.write(name, kind) for name in listed(instruction.operands[0])]

    def step(threads: Threads) -> None:
        for i, write in enumerate(writers):
            write(threads, np.frombuffer(threads.parameters, TYPES[kind], 1, offset + i * width)[0])

    return step


def _load_or_store(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    is_load, kind = parts[0] != "st", parts[-1]
    address, data = instruction.operands[::-1] if is_load else instruction.operands[:2]
    read_address, named = scope.address(address)
    space = _space_of(parts, named)
    vector = next((part for part in parts if re.fullmatch("v[248]", part)), "v1")
    rest = {part.removesuffix("::cta") for part in parts[1:-1]} - _HINTS - {space, vector, "param"}
    if rest or kind not in TYPES or kind == "pred":
        raise unknown(instruction)
    width, count, is_strong = width_bytes(kind), int(vector[1:]), bool(_STRONG & set(parts))
    if width * count > 16:
        raise unknown(instruction)
    if is_load:
        writers = [scope.write(name, kind) for name in listed(data)]

        def load(threads: Threads) -> None:
            words = threads.load(space, threads.chosen(read_address(threads)), width * count, is_strong)
            columns = words.view(TYPES[kind]).reshape(-1, count)
            for i, write in enumerate(writers):
                write(threads, threads.spread(np.ascontiguousarray(columns[:, i])))

        return load
    readers = [scope.read(name, kind) for name in listed(data)]

    def store(threads: Threads) -> None:
        columns = np.empty((threads.active.count, count), TYPES[kind])
        for i, read in enumerate(readers):
            columns[:, i] = threads.chosen(read(threads))
        words = columns.reshape(-1).view(_word(width * count))
        threads.store(space, threads.chosen(read_address(threads)), words, width * count, is_strong)

    return store


def _word(size: int) -> type:
    return np.complex128 if size == 16 else REGISTER_TYPES[size]


def _updated(operation: str, kind: str) -> Callable[..., Array]:
    """What an atomic writes, of the old value and the operands."""
    if operation == "add" and kind in floats.FLOAT_TYPES:
        return lambda old, a: floats.add(old, a, kind, "rn")
    known: dict[str, Callable[..., Array]] = {
        "add": lambda old, a: old + a,
        "and": lambda old, a: old & a,
        "or": lambda old, a: old | a,
        "xor": lambda old, a: old ^ a,
        "min": np.minimum,
        "max": np.maximum,
        "exch": lambda old, a: a,
        "cas": lambda old, a, b: np.where(old == a, b, old),
        "inc": lambda old, a: np.where(old >= a, TYPES[kind](0), old + TYPES[kind](1)),
        "dec": lambda old, a: np.where((old == 0) | (old > a), a, old - TYPES[kind](1)),
    }
    return known[operation]


def _atomic(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    has_result, kind = parts[0] == "atom", parts[-1]
    operands = instruction.operands[1:] if has_result else instruction.operands
    read_address, named = scope.address(operands[0])
    space = _space_of(parts, named)
    operation = next((part for part in parts[1:-1] if part in _OPERATIONS), "")
    rest = {part.removesuffix("::cta") for part in parts[1:-1]} - _HINTS - {space, operation, "noftz"}
    is_float = kind in floats.FLOAT_TYPES
    if rest or kind not in TYPES or width_bytes(kind) < 2 or operation not in (("add",) if is_float else _OPERATIONS):
        raise unknown(instruction)
    if not operation or len(operands) != (3 if operation == "cas" else 2):
        raise unknown(instruction)
    update = _updated(operation, kind)
    # A sum of floats needs each NaN replaced on the way.
    accumulate = None if is_float else _ACCUMULATED.get(operation)
    readers = [scope.read(operand, kind) for operand in operands[1:]]
    write = scope.write(instruction.operands[0], kind) if has_result else None

    def step(threads: Threads) -> None:
        address = threads.chosen(read_address(threads))
        values = [threads.chosen(read(threads)) for read in readers]
        old = np.empty(len(address), TYPES[kind])
        # One shared address is a place of its own in every block.
        is_shared = (address >= np.uint64(SHARED_WINDOW)) | (space == "shared")
        places = address + is_shared * (threads.row[threads.active.lanes].astype(np.uint64) << np.uint64(32))
        if accumulate and len(np.unique(places)) < len(places) // 8:
            _in_one_go(threads, space, address, places, values[0], old, accumulate)
        else:
            _in_rounds(threads, space, address, places, values, old, update)
        if write:
            write(threads, threads.spread(old))

    return step


def _in_rounds(
    threads: Threads,
    space: str,
    address: Array,
    places: Array,
    values: list[Array],
    old: Array,
    update: Callable[..., Array],
) -> None:
    """In each round every place is updated once, by the first of its threads that is still to come."""
    size, pending = old.dtype.itemsize, np.arange(len(places))
    while pending.size:
        now = np.sort(pending[np.unique(places[pending], return_index=True)[1]])
        with threads.only(now):
            old[now] = threads.load(space, address[now], size, True).view(old.dtype)
            new = np.asarray(update(old[now], *[value[now] for value in values]), old.dtype)
            threads.store(space, address[now], new.view(REGISTER_TYPES[size]), size, True)
        pending = np.setdiff1d(pending, now, assume_unique=True)


def _in_one_go(
    threads: Threads, space: str, address: Array, places: Array, value: Array, old: Array, combine: np.ufunc
) -> None:
    """The same for many threads at few places: one running total for each."""
    size = old.dtype.itemsize
    for place in np.unique(places):
        members = np.flatnonzero(places == place)
        with threads.only(members):
            before = threads.load(space, address[members], size, True).view(old.dtype)
            totals = combine.accumulate(np.concatenate([before[:1], value[members]]), dtype=old.dtype)
            old[members] = totals[:-1]
            new = np.full(len(members), totals[-1]).view(REGISTER_TYPES[size])
            threads.store(space, address[members], new, size, True)


def _copy(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    if parts[2] == "commit_group":

        def commit(threads: Threads) -> None:
            threads.copy_group = threads.copy_group + threads.active.mask

        return commit
    if parts[2] in ("wait_group", "wait_all"):
        n_pending = int(instruction.operands[0]) if parts[2] == "wait_group" else -1
        return lambda threads: threads.finish_copies(n_pending)
    rest = {part.removesuffix("::cta") for part in parts[2:]} - _HINTS - {"shared", "global"}
    size = int(instruction.operands[2])
    if rest or size not in (4, 8, 16) or len(instruction.operands) > 4 or ("cg" in parts and size != 16):
        raise unknown(instruction)
    read_to, _ = scope.address(instruction.operands[0])
    read_from, _ = scope.address(instruction.operands[1])
    read_size: Reader = scope.read(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32")

    def step(threads: Threads) -> None:
        source, n_bytes = threads.chosen(read_from(threads)), threads.chosen(read_size(threads))
        values = np.zeros(len(source), _word(size))
        for length in np.unique(n_bytes):
            wanted = np.flatnonzero(n_bytes == length)
            values[wanted] = _partial(threads, source, wanted, int(length), size)
        threads.start_copy(threads.chosen(read_to(threads)), values, size)

    return step


def _partial(threads: Threads, source: Array, wanted: Array, length: int, size: int) -> Array:
    """The first `length` bytes at each wanted source address, the rest zero."""
    columns = np.zeros((len(wanted), size), np.uint8)
    with threads.only(wanted):
        if length == size:
            return threads.load("global", source[wanted], size)
        for i in range(length):
            columns[:, i] = threads.load("global", source[wanted] + np.uint64(i), 1)
    return columns.reshape(-1).view(_word(size))


def _load_matrix(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    """ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16: lane 8i + r has the address of row r of matrix i."""
    count = next((int(part[1]) for part in parts if re.fullmatch("x[124]", part)), 0)
    is_transposed = "trans" in parts
    known = {"ldmatrix", "sync", "aligned", "m8n8", "shared", "shared::cta", "b16", "trans", f"x{count}"}
    if not set(parts) <= known or not count:
        raise unknown(instruction)
    writers = [scope.write(name, "b32") for name in listed(instruction.operands[0])]
    read_address, _ = scope.address(instruction.operands[1])

    def step(threads: Threads) -> None:
        require_whole_warps(threads)
        address = np.broadcast_to(read_address(threads), threads.n)
        lane = np.arange(threads.n) % 32
        with threads.only(np.flatnonzero((lane < 8 * count)[threads.active.lanes])):
            rows = threads.load("shared", threads.chosen(address), 16)
        # [warp, matrix, row, column]; lane 4g + t gets two neighbours of row g, from column 2t.
        halves = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
        if is_transposed:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
        for i, write in enumerate(writers):
            write(threads, threads.spread(np.ascontiguousarray(words[:, i]).reshape(-1)))

    return step
