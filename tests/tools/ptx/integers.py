"""Integer, logic and bit instructions, as functions of arrays of the instruction's type.

A `Pure` is what an instruction computes: function of the sources, the sources' types, the result's type. Everything is
modulo 2^width, as NumPy does it. What the PTX ISA leaves open (division by zero) is reported by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.operands import TYPES, width_bytes

Array = npt.NDArray[Any]


class Pure(NamedTuple):
    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str
    is_approximate: bool = False


def bits(kind: str) -> int:
    return 8 * width_bytes(kind)


def unsigned(kind: str) -> type:
    return TYPES[f"u{bits(kind)}"]


def wider(kind: str) -> str:
    return f"{kind[0]}{2 * bits(kind)}"


def high_product(a: Array, b: Array, kind: str) -> Array:
    """The upper half of a * b."""
    if bits(kind) < 64:
        wide = TYPES[wider(kind)]
        product = a.astype(wide) * b.astype(wide)
        return (product >> wide(bits(kind))).astype(TYPES[kind])
    low_mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low_mask, x >> half, y & low_mask, y >> half
    middle = x1 * y0 + ((x0 * y0) >> half)
    high = x1 * y1 + (middle >> half) + (((middle & low_mask) + x0 * y1) >> half)
    if kind == "s64":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return np.asarray(high).view(TYPES[kind])


def product(parts: list[str]) -> tuple[Callable[[Array, Array], Array], str]:
    """The multiplication of `mul.MODE.KIND`, and its result's type."""
    mode, kind = parts[1], parts[-1]
    if mode == "lo":
        return np.multiply, kind
    if mode == "hi":
        return lambda a, b: high_product(a, b, kind), kind
    if mode == "wide":
        wide = TYPES[wider(kind)]
        return lambda a, b: a.astype(wide) * b.astype(wide), wider(kind)
    raise NotImplementedError(".".join(parts))


def shift_left(value: Array, amount: Array, kind: str) -> Array:
    kept = np.minimum(amount, np.uint32(bits(kind) - 1)).astype(unsigned(kind))
    return np.where(amount >= bits(kind), unsigned(kind)(0), value << kept)


def shift_right(value: Array, amount: Array, kind: str) -> Array:
    kept = np.minimum(amount, np.uint32(bits(kind) - 1)).astype(TYPES[kind])
    shifted = value >> kept
    return shifted if kind[0] == "s" else np.where(amount >= bits(kind), TYPES[kind](0), shifted)


def funnel_shift(low: Array, high: Array, amount: Array, is_left: bool, is_clamped: bool) -> Array:
    """shf: 32 of the 64 bits high:low."""
    step = np.minimum(amount, np.uint32(32)) if is_clamped else amount & np.uint32(31)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    shift = (np.uint64(32) - step) if is_left else step.astype(np.uint64)
    return (both >> shift).astype(np.uint32)


def extract_field(value: Array, position: Array, length: Array, kind: str) -> Array:
    """bfe: `length` bits from `position`, extended by zeros, or by the field's top bit (or the value's, if beyond)."""
    width = bits(kind)
    start, n_bits = (position & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    raw = np.asarray(value).view(unsigned(kind)).astype(np.uint64)
    shifted = np.where(start >= width, np.uint64(0), raw >> np.minimum(start, 63).astype(np.uint64))
    mask = np.where(n_bits >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(n_bits, 63).astype(np.uint64)) - 1)
    field = shifted & mask
    if kind[0] == "s":
        top = np.minimum(start + n_bits - 1, width - 1)
        sign = ((raw >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)).astype(bool) & (n_bits > 0)
        n_inside = np.clip(width - start, 0, None)
        filled = np.minimum(n_bits, n_inside)
        ones = np.where(filled >= 64, np.uint64(0), ~np.uint64(0) << np.minimum(filled, 63).astype(np.uint64))
        field = np.where(sign, field | ones, field)
    return field.astype(unsigned(kind)).view(TYPES[kind])


def insert_field(field: Array, value: Array, position: Array, length: Array, kind: str) -> Array:
    """bfi: the low `length` bits of field, put into value from `position`."""
    width, word = bits(kind), unsigned(kind)
    start, n_bits = (position & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    ones = np.where(n_bits >= width, ~word(0), (word(1) << np.minimum(n_bits, width - 1).astype(word)) - word(1))
    mask = np.where(start >= width, word(0), ones << np.minimum(start, width - 1).astype(word))
    moved = np.where(start >= width, word(0), field << np.minimum(start, width - 1).astype(word))
    return (value & ~mask) | (moved & mask)


def leading_zeros(value: Array, kind: str) -> Array:
    smeared = value
    for step in (1, 2, 4, 8, 16, 32)[: bits(kind).bit_length() - 1]:
        smeared = smeared | (smeared >> TYPES[kind](step))
    return (bits(kind) - np.bitwise_count(smeared)).astype(np.uint32)


def find_top_bit(value: Array, kind: str, is_shift: bool) -> Array:
    """bfind: position of the top bit that is not a sign; 2^32 - 1 if there is none."""
    plain = np.asarray(value).view(unsigned(kind))
    if kind[0] == "s":
        plain = np.where(value < 0, ~plain, plain)
    zeros = leading_zeros(plain, f"b{bits(kind)}")
    place = zeros if is_shift else np.uint32(bits(kind) - 1) - zeros
    return np.where(plain == 0, np.uint32(0xFFFFFFFF), place)


def reverse_bits(value: Array, kind: str) -> Array:
    spread = np.unpackbits(
        np.ascontiguousarray(value).reshape(-1).view(np.uint8).reshape(-1, width_bytes(kind)), axis=1, bitorder="little"
    )
    packed = np.packbits(spread[:, ::-1], axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view(TYPES[kind]).reshape(np.shape(value))


def permute_bytes(a: Array, b: Array, selector: Array, mode: str) -> Array:
    """prmt: four bytes of b:a; in the plain mode, bit 3 of a selector copies the byte's sign over all of it."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    turn = (selector & np.uint32(3)).astype(np.int64)
    chosen_by_mode: dict[str, Callable[[int], Array]] = {
        "f4e": lambda i: turn + i,
        "b4e": lambda i: (turn - i) % 8,
        "rc8": lambda i: turn,
        "ecl": lambda i: np.maximum(turn, i),
        "ecr": lambda i: np.minimum(turn, i),
        "rc16": lambda i: (turn & 1) * 2 + (i & 1),
        "": lambda i: ((selector >> np.uint32(4 * i)) & np.uint32(15)).astype(np.int64),
    }
    out = np.zeros(np.broadcast_shapes(np.shape(both), np.shape(selector)), np.uint64)
    for i in range(4):
        chosen = np.asarray(chosen_by_mode[mode](i))
        byte = (both >> (8 * (chosen & 7)).astype(np.uint64)) & np.uint64(255)
        byte = np.where(chosen & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out = out | (byte << np.uint64(8 * i))
    return out.astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit 4a + 2b + c of the table, for every bit."""
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for row in range(8):
        if table >> row & 1:
            out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return out


def dot_product(a: Array, b: Array, c: Array, kinds: list[str], n_terms: int) -> Array:
    """dp4a, and dp2a with its 16-bit values already cut out: the sum of products of bytes, modulo 2^32."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    total = np.broadcast_to(c, shape).astype(np.int64)
    for i in range(n_terms):
        total = total + _byte(a, i, kinds[0]) * _byte(b, i, kinds[1])
    return total.astype(np.uint32)


def _byte(value: Array, i: int, kind: str) -> Array:
    byte = ((value >> np.uint32(8 * i)) & np.uint32(255)).astype(np.uint8)
    return byte.view(np.int8 if kind == "s32" else np.uint8).astype(np.int64)


def pairwise(function: Callable[[Array, Array], Array], kind: str) -> Callable[[Array, Array], Array]:
    """A function of two 16-bit values, on both halves of 32-bit words."""
    half = {"u16x2": np.uint16, "s16x2": np.int16, "f16x2": np.float16, "bf16x2": np.uint16}[kind]

    def on_words(*words: Array) -> Array:
        low, high = (
            np.asarray(function(*[((word >> shift).astype(np.uint16)).view(half) for word in words])).view(np.uint16)
            for shift in (np.uint32(0), np.uint32(16))
        )
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    return on_words


def divide(a: Array, b: Array) -> Array:
    """Towards zero; NumPy rounds down."""
    quotient = a // b
    if np.issubdtype(quotient.dtype, np.unsignedinteger):
        return quotient
    is_inexact = (a - quotient * b != 0) & ((a < 0) != (b < 0))
    return (quotient + is_inexact).astype(quotient.dtype)


def remainder(a: Array, b: Array) -> Array:
    return np.fmod(a, b)


def saturated(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A function of s32, its result clamped to s32."""
    limits = np.iinfo(np.int32)
    return lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(
        np.int32
    )
