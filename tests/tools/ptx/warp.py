"""Instructions of a whole warp: shfl, vote, redux, activemask, and mma of 8-bit and 16-bit matrices.

The interpreter lets a warp instruction happen once all living threads in the membermask have arrived. Reading a thread
that is not active, or not in the mask, is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import floats
from tests.tools.ptx.memory import Fault
from tests.tools.ptx.operands import TYPES, Reader, Scope, Step, Writer, listed, unknown
from tests.tools.ptx.parser import Instruction
from tests.tools.ptx.threads import WARP, Threads

Array = npt.NDArray[Any]


class Exchange(NamedTuple):
    """A warp instruction as what it reads, what it makes of that, and what it writes.

    Its threads need not stand at the same instruction: compilers split loops by a condition of the thread, and the ISA
    asks only for "the same qualifiers and same membermask". So the interpreter reads at each of them, mixes, computes
    once, and writes at each of them. The last of the readers is that of the membermask.
    """

    readers: list[Reader]
    compute: Callable[..., tuple[Array, ...]]
    writers: list[Writer]


def exchange(instruction: Instruction, scope: Scope) -> Exchange | None:
    """The exchange of an instruction with a membermask; None if it is none."""
    parts, operands = instruction.opcode.split("."), instruction.operands
    if instruction.opcode == "bar.warp.sync":
        return Exchange([scope.read(operands[0], "b32")], _synchronize, [])
    if parts[:2] == ["shfl", "sync"] and parts[3:] == ["b32"] and parts[2] in ("up", "down", "bfly", "idx"):
        value_to, _, valid_to = (part.strip() for part in operands[0].partition("|"))
        writers = [scope.write(value_to, "b32"), scope.write(valid_to or "_", "pred")]
        return Exchange([scope.read(each, "b32") for each in operands[1:]], _shuffle(parts[2]), writers)
    if parts[:2] == ["vote", "sync"] and ".".join(parts[2:]) in ("any.pred", "all.pred", "uni.pred", "ballot.b32"):
        readers = [scope.read(operands[1], "pred"), scope.read(operands[2], "b32")]
        return Exchange(readers, _vote(parts[2]), [scope.write(operands[0], parts[3])])
    if parts[:2] == ["redux", "sync"] and parts[2] in _COMBINED and parts[3:] in (["u32"], ["s32"], ["b32"]):
        readers = [scope.read(operands[1], parts[3]), scope.read(operands[2], "b32")]
        return Exchange(readers, _reduce(parts[2]), [scope.write(operands[0], parts[3])])
    return None


def decode(instruction: Instruction, scope: Scope) -> Step | None:
    """The step of a warp instruction without a membermask; None if it is none of them."""
    if instruction.opcode == "activemask.b32":
        write = scope.write(instruction.operands[0], "b32")
        return lambda threads: write(threads, ballot(threads.active.mask))
    parts = instruction.opcode.split(".")
    return _multiply(instruction, scope, parts) if parts[:3] == ["mma", "sync", "aligned"] else None


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


def _synchronize(threads: Threads, mask: Array) -> tuple[Array, ...]:
    threads.epoch = threads.epoch + threads.active.mask.reshape(-1, WARP).any(axis=1)
    return ()


def _shuffle(mode: str) -> Callable[..., tuple[Array, ...]]:
    def compute(threads: Threads, values: Array, by: Array, clamp: Array, mask: Array) -> tuple[Array, ...]:
        lane = np.arange(threads.n) % WARP
        step = (by & np.uint32(31)).astype(np.int64)
        limit = (clamp & np.uint32(31)).astype(np.int64)
        segment = ((clamp >> np.uint32(8)) & np.uint32(31)).astype(np.int64)
        first, last = lane & segment, (lane & segment) | (limit & ~segment)
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": first | (step & ~segment)}[mode]
        is_valid = source >= last if mode == "up" else source <= last
        source = np.where(is_valid, source, lane)
        is_here = (_members(threads, mask) >> source.astype(np.uint32)) & np.uint32(1) == 1
        _require_sources(threads, is_here, source)
        return values[np.arange(threads.n) - lane + source], is_valid

    return compute


def _require_sources(threads: Threads, is_here: Array, source: Array) -> None:
    if (absent := threads.active.mask & ~is_here).any():
        lane = int(np.argmax(absent))
        raise Fault(f"reads lane {int(source[lane])}, which does not take part", lane=lane)


def _vote(mode: str) -> Callable[..., tuple[Array, ...]]:
    def compute(threads: Threads, predicate: Array, mask: Array) -> tuple[Array, ...]:
        members = _members(threads, mask)
        votes = ballot(predicate & threads.active.mask) & members
        results = {"any": votes != 0, "all": votes == members, "uni": (votes == 0) | (votes == members)}
        return (votes if mode == "ballot" else results[mode],)

    return compute


_COMBINED = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
_COMBINED["xor"] = np.bitwise_xor


def _reduce(operation: str) -> Callable[..., tuple[Array, ...]]:
    def compute(threads: Threads, values: Array, mask: Array) -> tuple[Array, ...]:
        members, out = _members(threads, mask), values.copy()
        for lane in threads.active.lanes:
            start = lane // WARP * WARP
            taking_part = np.flatnonzero((members[lane] >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1))
            out[lane] = _COMBINED[operation].reduce(values[start + taking_part], dtype=values.dtype)
        return (out,)

    return compute


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
