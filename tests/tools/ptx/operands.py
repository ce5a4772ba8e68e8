"""Operands as functions of the threads: registers, numbers, special registers, addresses, in the instruction's type.

The value of a type is a NumPy array of it, or a scalar where all threads agree; bf16 and pairs of 16 bits are bit
patterns. A register may be wider than the type: it is cut when read, and extended by sign or zero when written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.parser import NAME, WIDTH_BYTES, Instruction, PtxSyntaxError
from tests.tools.ptx.threads import REGISTER_TYPES, SPECIAL_REGISTERS, Threads

Array = npt.NDArray[Any]
Reader = Callable[[Threads], Array]
Writer = Callable[[Threads, Array], None]
Step = Callable[[Threads], None]

TYPES: dict[str, type] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "f16x2": np.uint32,
    "bf16x2": np.uint32, "u16x2": np.uint32, "s16x2": np.uint32,
}  # fmt: skip
_BRACKETS = re.compile(rf"\[\s*({NAME}|-?\d\w*)\s*(?:\+\s*(-?\s*\d\w*))?\s*(?:-\s*(\d\w*))?\s*\]")


def width_bytes(kind: str) -> int:
    return 0 if kind == "pred" else int(np.dtype(TYPES[kind]).itemsize)


class Place(NamedTuple):
    """Where a variable is: an address in its state space."""

    space: str
    address: int


class Scope:
    """What the names of a function stand for: registers, variables (in `places`), parameters (their offsets)."""

    def __init__(self, registers: dict[str, str], places: dict[str, Place], parameters: dict[str, int]) -> None:
        self.kinds = registers
        self.index = {name: index for index, name in enumerate(registers)}
        self.places, self.parameters = places, parameters

    @property
    def register_bytes(self) -> list[int]:
        return [0 if kind == "pred" else WIDTH_BYTES[kind] for kind in self.kinds.values()]

    def read(self, operand: str, kind: str) -> Reader:
        """A reader of the operand as `kind`."""
        if operand.startswith("!"):
            inner = self.read(operand[1:].strip(), "pred")
            return lambda threads: ~inner(threads)
        if operand in self.index:
            return self._read_register(operand, kind)
        if operand.startswith("%"):
            if operand not in SPECIAL_REGISTERS:
                raise NotImplementedError(operand)
            return lambda threads: cast(threads.special(operand), kind)
        value = self._constant(operand, kind)
        return lambda threads: value

    def _read_register(self, operand: str, kind: str) -> Reader:
        index, width, asked = self.index[operand], width_bytes(_plain(self.kinds[operand])), width_bytes(kind)
        if width < asked or (width == 0) != (asked == 0):
            raise PtxSyntaxError(f"{operand} of type {self.kinds[operand]} is read as {kind}")
        if kind == "pred" or (width == asked and TYPES[kind] is REGISTER_TYPES[width]):
            return lambda threads: threads.registers[index]
        target, unsigned = TYPES[kind], REGISTER_TYPES[asked]
        if width == asked:
            return lambda threads: threads.registers[index].view(target)
        return lambda threads: threads.registers[index].astype(unsigned).view(target)

    def _constant(self, operand: str, kind: str) -> Array:
        if operand in self.places:
            return np.uint64(self.places[operand].address).astype(TYPES[kind])
        if operand == "WARP_SZ":
            operand = "32"
        if found := re.fullmatch(r"0([fF])([0-9a-fA-F]{8})|0([dD])([0-9a-fA-F]{16})", operand):
            bits = np.uint32(int(found[2], 16)) if found[1] else np.uint64(int(found[4], 16))
            number = bits.view(np.float32) if found[1] else bits.view(np.float64)
            if kind in ("f32", "f64"):
                return np.asarray(number.astype(TYPES[kind]))[()]
            if bits.itemsize == width_bytes(kind):
                return bits.view(TYPES[kind])
        elif re.fullmatch(r"[+-]?\d+\.\d*(?:[eE][+-]?\d+)?", operand) and kind in ("f32", "f64"):
            return TYPES[kind](operand)
        elif re.fullmatch(r"-?\d\w*", operand):
            value = integer(operand)
            if kind == "pred":
                return np.bool_(value)
            width = width_bytes(kind)
            if kind not in ("f32", "f64"):
                unsigned = REGISTER_TYPES[width](value % (1 << 8 * width))
                return unsigned.view(TYPES[kind])
        raise PtxSyntaxError(f"operand {operand!r} as {kind}")

    def write(self, operand: str, kind: str) -> Writer:
        """A writer of values of `kind`; `_` takes any and keeps none."""
        if operand == "_":
            return lambda threads, value: None
        if operand not in self.index:
            raise PtxSyntaxError(f"{operand!r} is not a register")
        index, width, given = self.index[operand], width_bytes(_plain(self.kinds[operand])), width_bytes(kind)
        if width < given or (width == 0) != (given == 0):
            raise PtxSyntaxError(f"{operand} of type {self.kinds[operand]} is written as {kind}")
        register = REGISTER_TYPES[width]
        if width == given:
            return lambda threads, value: threads.write(index, value.view(register))
        # Signed integers grow by their sign, all others by zeros.
        own = TYPES[kind] if kind[0] == "s" else REGISTER_TYPES[given]
        return lambda threads, value: threads.write(index, value.view(own).astype(register))

    def address(self, operand: str) -> tuple[Reader, str]:
        """A reader of `[base + offset]` as uint64, and the state space of a named base."""
        found = _BRACKETS.fullmatch(operand)
        if not found:
            raise PtxSyntaxError(f"address {operand!r}")
        base, offset = found[1], 0
        if found[2] or found[3]:
            offset = integer(found[2].replace(" ", "")) if found[2] else -integer(found[3])
        if base in self.places:
            place = self.places[base]
            constant = np.uint64(place.address + offset)
            return lambda threads: constant, place.space
        width = width_bytes(_plain(self.kinds[base])) if base in self.kinds else 8
        inner = self.read(base, {4: "u32", 8: "u64"}[width])
        if width == 4:
            narrow_step = np.uint32(offset % (1 << 32))
            return lambda threads: (inner(threads) + narrow_step).astype(np.uint64), ""
        step = np.uint64(offset % (1 << 64))
        return (lambda threads: inner(threads) + step) if offset else inner, ""


def _plain(kind: str) -> str:
    return kind if kind in TYPES else "b32"


def cast(value: Array, kind: str) -> Array:
    """An unsigned value in the bits of another integer type."""
    return value.astype(TYPES[kind])


def integer(text: str) -> int:
    """A PTX integer literal: decimal, 0x, 0b, or octal with a leading 0; U is ignored."""
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    digits = digits.rstrip("U")
    if re.fullmatch(r"0[0-7]+", digits):
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def listed(operand: str) -> list[str]:
    """The names of a `{a, b}` operand, or of a single one."""
    return [each.strip() for each in operand.strip("{}").split(",")]


def unknown(instruction: Instruction) -> NotImplementedError:
    return NotImplementedError(f"line {instruction.line}: {instruction.text}")
