"""Instructions of a whole warp: shfl, vote, redux, activemask, and mma of 8-bit and 16-bit matrices.

The interpreter calls these steps only for warps whose living threads in the membermask have all arrived. Reading a
thread that is not active, or not in the mask, is reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.ptx import floats
from tests.ptx.memory import Fault
from tests.ptx.operands import TYPES, Scope, Step, listed, unknown
from tests.ptx.parser import Instruction
from tests.ptx.threads import WARP, Threads

Array = npt.NDArray[Any]


def decode(instruction: Instruction, scope: Scope) -> Step | None:
    """The step of a warp instruction; None if it is none of them."""
    parts = instruction.opcode.split(".")
    if parts[:2] == ["shfl", "sync"] and parts[3:] == ["b32"]:
        return _shuffle(instruction, scope, parts[2])
    if parts[:2] == ["vote", "sync"]:
        return _vote(instruction, scope, parts[2])
    if parts[:2] == ["redux", "sync"] and len(parts) == 4:
        return _reduce(instruction, scope, parts[2], parts[3])
    if instruction.opcode == "activemask.b32":
        write = scope.write(instruction.operands[0], "b32")
        return lambda threads: write(threads, ballot(threads.active.mask))
    if parts[:3] == ["mma", "sync", "aligned"]:
        return _multiply(instruction, scope, parts)
    return None


def membermask(instruction: Instruction) -> str | None:
    """The operand that names the threads which must execute the instruction together; None if it needs none."""
    parts = instruction.opcode.split(".")
    if parts[:2] in (["shfl", "sync"], ["vote", "sync"], ["redux", "sync"]):
        return instruction.operands[-1]
    if parts[:3] == ["bar", "warp", "sync"]:
        return instruction.operands[0]
    return "-1" if parts[:2] in (["mma", "sync"], ["ldmatrix", "sync"]) else None


def require_whole_warps(threads: Threads) -> None:
    """What a whole warp computes together, none of its threads may miss."""
    lanes = threads.active.mask.reshape(-1, WARP)
    if (partial := lanes.any(axis=1) & ~lanes.all(axis=1)).any():
        warp = int(np.argmax(partial))
        raise Fault("only a part of the warp executes this", lane=WARP * warp + int(np.argmax(lanes[warp])))


def ballot(votes: Array) -> Array:
    """One bit per thread, to every thread of its warp."""
    words = (votes.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1)
    return np.repeat(words.astype(np.uint32), WARP)


def _members(threads: Threads, mask: Array) -> Array:
    """Bits of the threads in each thread's mask that are here."""
    return mask & ballot(threads.active.mask)


def _shuffle(instruction: Instruction, scope: Scope, mode: str) -> Step:
    target, *sources = instruction.operands
    value_to, _, valid_to = (part.strip() for part in target.partition("|"))
    write = scope.write(value_to, "b32")
    write_valid = scope.write(valid_to, "pred") if valid_to else None
    read, by, clamp, mask = (scope.read(each, "b32") for each in sources)
    if mode not in ("up", "down", "bfly", "idx"):
        raise unknown(instruction)

    def step(threads: Threads) -> None:
        values = np.broadcast_to(read(threads), threads.n)
        lane = np.arange(threads.n) % WARP
        step_by = (by(threads) & np.uint32(31)).astype(np.int64)
        limit = (clamp(threads) & np.uint32(31)).astype(np.int64)
        segment = ((clamp(threads) >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
        first, last = lane & segment, (lane & segment) | (limit & ~segment)
        source = {
            "up": lane - step_by,
            "down": lane + step_by,
            "bfly": lane ^ step_by,
            "idx": first | (step_by & ~segment),
        }[mode]
        is_valid = source >= last if mode == "up" else source <= last
        source = np.where(is_valid, source, lane)
        here = _members(threads, np.broadcast_to(mask(threads), threads.n))
        _require_sources(threads, (here >> source.astype(np.uint32)) & np.uint32(1) == 1, source)
        write(threads, values[np.arange(threads.n) - lane + source])
        if write_valid:
            write_valid(threads, is_valid)

    return step


def _require_sources(threads: Threads, is_here: Array, source: Array) -> None:
    if (absent := threads.active.mask & ~is_here).any():
        lane = int(np.argmax(absent))
        raise Fault(f"reads lane {int(source[lane])}, which does not take part", lane=lane)


def _vote(instruction: Instruction, scope: Scope, mode: str) -> Step:
    read, mask = scope.read(instruction.operands[1], "pred"), scope.read(instruction.operands[2], "b32")
    if mode not in ("any", "all", "uni", "ballot"):
        raise unknown(instruction)
    write = scope.write(instruction.operands[0], "b32" if mode == "ballot" else "pred")

    def step(threads: Threads) -> None:
        members = _members(threads, np.broadcast_to(mask(threads), threads.n))
        votes = ballot(np.broadcast_to(read(threads), threads.n) & threads.active.mask) & members
        results = {"any": votes != 0, "all": votes == members, "uni": (votes == 0) | (votes == members)}
        write(threads, votes if mode == "ballot" else results[mode])

    return step


def _reduce(instruction: Instruction, scope: Scope, operation: str, kind: str) -> Step:
    known = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    known["xor"] = np.bitwise_xor
    if operation not in known or kind not in ("u32", "s32", "b32"):
        raise unknown(instruction)
    read, mask = scope.read(instruction.operands[1], kind), scope.read(instruction.operands[2], "b32")
    write, combine = scope.write(instruction.operands[0], kind), known[operation]

    def step(threads: Threads) -> None:
        values = np.broadcast_to(read(threads), threads.n)
        members = _members(threads, np.broadcast_to(mask(threads), threads.n))
        out = values.copy()
        for lane in threads.active.lanes:
            start = lane // WARP * WARP
            taking_part = np.flatnonzero((members[lane] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1))
            out[lane] = combine.reduce(values[start + taking_part], dtype=TYPES[kind])
        write(threads, out)

    return step


def _multiply(instruction: Instruction, scope: Scope, parts: list[str]) -> Step:
    """mma.sync.aligned.mMnNkK.row.col.D.A.B.C: D = A @ B + C, one 16x8 (or 8x8) tile per warp.

    Lane 4g + t holds of A row g (and g + 8) and of B column g, from element t * (elements per register), and so on
    every four registers' worth; of C and D row g (and g + 8), columns 2t and 2t + 1. PTX ISA, "Matrix Fragments".
    Integers wrap modulo 2^32. Products of floats are summed in float64 here, in an unknown way by the hardware.
    """
    shapes = {"m16n8k32": (2, 2, 1), "m16n8k16": (2, 1, 1), "m8n8k16": (1, 1, 1)}
    float_shapes = {"m16n8k16": (2, 2, 2), "m16n8k8": (2, 1, 2)}
    shape, kinds = parts[3], parts[-4:]
    is_integer = kinds[0] == kinds[3] == "s32" and {*kinds[1:3]} <= {"s8", "u8"}
    is_float = kinds[0] == kinds[3] == "f32" and kinds[1] == kinds[2] and kinds[1] in ("f16", "bf16")
    known = shapes if is_integer else float_shapes if is_float else {}
    if shape not in known or parts[4:6] != ["row", "col"] or len(parts) != 10:
        raise unknown(instruction)
    n_halves, n_deep, element_bytes = known[shape]
    result_kind = kinds[0]
    a_readers, b_readers, c_readers = (
        [scope.read(name, kind) for name in listed(operand)]
        for operand, kind in zip(instruction.operands[1:], ("b32", "b32", result_kind), strict=True)
    )
    writers = [scope.write(name, result_kind) for name in listed(instruction.operands[0])]
    if [len(a_readers), len(b_readers), len(writers)] != [n_halves * n_deep, n_deep, 2 * n_halves]:
        raise unknown(instruction)

    def step(threads: Threads) -> None:
        require_whole_warps(threads)
        a_words, b_words, c_words = (
            np.stack([np.broadcast_to(read(threads), threads.n) for read in readers], axis=-1)
            for readers in (a_readers, b_readers, c_readers)
        )
        a = _elements(a_words, kinds[1]).reshape(-1, 8, 4, n_deep, n_halves, 4 // element_bytes)
        b = _elements(b_words, kinds[2]).reshape(-1, 8, 4, n_deep, 4 // element_bytes)
        a = a.transpose(0, 4, 1, 3, 2, 5).reshape(len(a), 8 * n_halves, -1)
        b = b.transpose(0, 1, 3, 2, 4).reshape(len(b), 8, -1)
        product = (a @ b.transpose(0, 2, 1)).reshape(-1, n_halves, 8, 4, 2)
        c = c_words.reshape(-1, 8, 4, n_halves, 2)
        product = product.transpose(0, 2, 3, 1, 4)
        if is_integer:
            total = (product.astype(np.int64) + c).astype(np.int32)
        else:
            total = floats.narrow(product + c, "f32", "rn")
        columns = total.reshape(threads.n, -1)
        for i, write in enumerate(writers):
            write(threads, np.ascontiguousarray(columns[:, i]))

    return step


def is_approximate(opcode: str) -> bool:
    return opcode.startswith("mma.") and opcode.endswith("f32")


def _elements(words: Array, kind: str) -> Array:
    """The values in 32-bit words, in float64: sums of 32 products of bytes are exact in it."""
    words = np.ascontiguousarray(words)
    if kind in ("s8", "u8"):
        return words.view(TYPES[kind]).astype(np.float64)
    return floats.widen(words.view(TYPES[kind]), kind)
