"""Integer and bit instructions against Python's integers, from the definitions of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.tools.ptx.snippets import evaluate

EDGES = [0, 1, 2, 3, 5, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000]
EDGES += [0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
PYTHON = Callable[..., int]


def signed(value: int, width: int) -> int:
    value %= 1 << width
    return value - (1 << width) if value >> (width - 1) else value


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(value: int, start: int, length: int, width: int, is_signed: bool) -> int:
    """bfe, bit by bit, as the ISA writes it."""
    start, length = start & 255, length & 255
    top = min(start + length - 1, width - 1)
    fill = (value >> top) & 1 if is_signed and length else 0
    bits = [(value >> (start + i)) & 1 if i < length and start + i < width else fill for i in range(width)]
    return sum(bit << i for i, bit in enumerate(bits))


def inserted(a: int, b: int, start: int, length: int, width: int) -> int:
    start, length = start & 255, length & 255
    for i in range(length):
        if start + i < width:
            b = b & ~(1 << (start + i)) | ((a >> i) & 1) << (start + i)
    return b


def permuted(a: int, b: int, selector: int) -> int:
    source = [(a | b << 32) >> (8 * i) & 255 for i in range(8)]
    out = 0
    for i in range(4):
        pick = selector >> (4 * i) & 15
        byte = source[pick & 7]
        out |= ((255 if byte & 128 else 0) if pick & 8 else byte) << (8 * i)
    return out


def bytes_of(value: int, is_signed: bool) -> list[int]:
    return [signed(value >> (8 * i), 8) if is_signed else value >> (8 * i) & 255 for i in range(4)]


def dot(a: int, b: int, c: int, a_signed: bool, b_signed: bool) -> int:
    return c + sum(x * y for x, y in zip(bytes_of(a, a_signed), bytes_of(b, b_signed), strict=True))


def leading_zeros(value: int, width: int) -> int:
    return width - value.bit_length()


def top_bit(value: int, width: int, is_signed: bool) -> int:
    if is_signed and value >> (width - 1):
        value = ~value % (1 << width)
    return value.bit_length() - 1


def halves(function: PYTHON, a: int, b: int, is_signed: bool) -> int:
    pick = (lambda x: signed(x, 16)) if is_signed else (lambda x: x % (1 << 16))
    low, high = (function(pick(a >> s), pick(b >> s)) % (1 << 16) for s in (0, 16))
    return low | high << 16


# opcode, number of sources, width of the sources and of the result in bits, the meaning of unsigned Python integers
CASES: list[tuple[str, int, int, int, PYTHON]] = []
for w in (16, 32, 64):
    u, s = f"u{w}", f"s{w}"
    for name, meaning in {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
        "min": min, "max": max, "div": lambda a, b: a // (b or 1), "rem": lambda a, b: a % (b or 1),
    }.items():  # fmt: skip
        CASES.append((f"{name}.{u}", 2, w, w, meaning))
    for name, meaning in {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
        "div": lambda a, b: towards_zero(a, b or 1), "rem": lambda a, b: a - towards_zero(a, b or 1) * (b or 1),
    }.items():  # fmt: skip
        CASES.append((f"{name}.{s}", 2, w, w, lambda a, b, m=meaning, w=w: m(signed(a, w), signed(b, w))))
    CASES += [
        (f"mul.hi.{u}", 2, w, w, lambda a, b, w=w: a * b >> w),
        (f"mul.hi.{s}", 2, w, w, lambda a, b, w=w: signed(a, w) * signed(b, w) >> w),
        (f"mad.lo.{s}", 3, w, w, lambda a, b, c: a * b + c),
        (f"mad.hi.{u}", 3, w, w, lambda a, b, c, w=w: (a * b >> w) + c),
        (f"neg.{s}", 1, w, w, lambda a: -a),
        (f"abs.{s}", 1, w, w, lambda a, w=w: abs(signed(a, w))),
        (f"and.b{w}", 2, w, w, lambda a, b: a & b),
        (f"or.b{w}", 2, w, w, lambda a, b: a | b),
        (f"xor.b{w}", 2, w, w, lambda a, b: a ^ b),
        (f"not.b{w}", 1, w, w, lambda a: ~a),
        (f"cnot.b{w}", 1, w, w, lambda a: int(a == 0)),
    ]
for w in (16, 32):
    CASES += [
        (f"mul.wide.u{w}", 2, w, 2 * w, lambda a, b: a * b),
        (f"mul.wide.s{w}", 2, w, 2 * w, lambda a, b, w=w: signed(a, w) * signed(b, w)),
    ]
for w in (32, 64):
    CASES += [
        (f"popc.b{w}", 1, w, 32, lambda a: a.bit_count()),
        (f"clz.b{w}", 1, w, 32, lambda a, w=w: leading_zeros(a, w)),
        (f"bfind.u{w}", 1, w, 32, lambda a, w=w: top_bit(a, w, False)),
        (f"bfind.s{w}", 1, w, 32, lambda a, w=w: top_bit(a, w, True)),
        (f"brev.b{w}", 1, w, w, lambda a, w=w: int(f"{a:0{w}b}"[::-1], 2)),
    ]
CASES += [
    ("bfind.shiftamt.u32", 1, 32, 32, lambda a: 31 - top_bit(a, 32, False) if a else -1),
    ("add.sat.s32", 2, 32, 32, lambda a, b: clamp(signed(a, 32) + signed(b, 32), -(1 << 31), (1 << 31) - 1)),
    ("sub.sat.s32", 2, 32, 32, lambda a, b: clamp(signed(a, 32) - signed(b, 32), -(1 << 31), (1 << 31) - 1)),
    ("mul24.lo.u32", 2, 32, 32, lambda a, b: (a % (1 << 24)) * (b % (1 << 24))),
    ("mul24.lo.s32", 2, 32, 32, lambda a, b: signed(a, 24) * signed(b, 24)),
    ("sad.u32", 3, 32, 32, lambda a, b, c: abs(a - b) + c),
    ("sad.s32", 3, 32, 32, lambda a, b, c: abs(signed(a, 32) - signed(b, 32)) + c),
    ("prmt.b32", 3, 32, 32, permuted),
    ("prmt.b32.f4e", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x3210, 0x4321, 0x5432, 0x6543)[c & 3])),
    ("prmt.b32.b4e", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x5670, 0x6701, 0x7012, 0x0123)[c & 3])),
    ("prmt.b32.rc8", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x0000, 0x1111, 0x2222, 0x3333)[c & 3])),
    ("prmt.b32.ecl", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x3210, 0x3211, 0x3222, 0x3333)[c & 3])),
    ("prmt.b32.ecr", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x0000, 0x1110, 0x2210, 0x3210)[c & 3])),
    ("prmt.b32.rc16", 3, 32, 32, lambda a, b, c: permuted(a, b, (0x1010, 0x3232, 0x1010, 0x3232)[c & 3])),
    ("shf.l.wrap.b32", 3, 32, 32, lambda a, b, c: (a | b << 32) >> (32 - (c & 31))),
    ("shf.r.wrap.b32", 3, 32, 32, lambda a, b, c: (a | b << 32) >> (c & 31)),
    ("shf.l.clamp.b32", 3, 32, 32, lambda a, b, c: (a | b << 32) >> (32 - min(c, 32))),
    ("shf.r.clamp.b32", 3, 32, 32, lambda a, b, c: (a | b << 32) >> min(c, 32)),
    ("dp4a.s32.s32", 3, 32, 32, lambda a, b, c: dot(a, b, c, True, True)),
    ("dp4a.u32.u32", 3, 32, 32, lambda a, b, c: dot(a, b, c, False, False)),
    ("dp4a.s32.u32", 3, 32, 32, lambda a, b, c: dot(a, b, c, True, False)),
    ("dp4a.u32.s32", 3, 32, 32, lambda a, b, c: dot(a, b, c, False, True)),
    ("min.u16x2", 2, 32, 32, lambda a, b: halves(min, a, b, False)),
    ("max.u16x2", 2, 32, 32, lambda a, b: halves(max, a, b, False)),
    ("min.s16x2", 2, 32, 32, lambda a, b: halves(min, a, b, True)),
    ("max.s16x2", 2, 32, 32, lambda a, b: halves(max, a, b, True)),
    ("add.s16x2", 2, 32, 32, lambda a, b: halves(lambda x, y: x + y, a, b, True)),
]
# A shift amount is a 32-bit register, whatever is shifted.
SHIFTS: list[tuple[str, int, PYTHON]] = []
for w in (16, 32, 64):
    SHIFTS += [
        (f"shl.b{w}", w, lambda a, n: a << min(n, 200)),
        (f"shr.u{w}", w, lambda a, n: a >> min(n, 200)),
        (f"shr.b{w}", w, lambda a, n: a >> min(n, 200)),
        (f"shr.s{w}", w, lambda a, n, w=w: signed(a, w) >> min(n, 200)),
    ]


def operand_sets(widths: list[int], n: int = 512) -> list[np.ndarray]:
    """Random values, all pairs of edges first; small numbers are as likely as large ones."""
    generator = np.random.default_rng(sum(widths))
    columns = []
    for place, width in enumerate(widths):
        edges = [edge % (1 << width) for edge in EDGES]
        across = edges * len(edges) if place % 2 else [edge for edge in edges for _ in edges]
        wide = generator.integers(0, 1 << 64, n, dtype=np.uint64, endpoint=False)
        drawn = wide >> generator.integers(0, 64, n).astype(np.uint64)
        columns.append(np.array(across + drawn.tolist(), np.uint64).astype(f"u{width // 8}"))
    columns[-1] = columns[-1][::-1].copy() if len(widths) == 3 else columns[-1]
    return columns


def check(body: str, columns: list[np.ndarray], width: int, meaning: PYTHON) -> None:
    n = len(columns[0]) // 2 * 2
    columns = [each[:n] for each in columns]
    found = evaluate(body, *columns, out=f"u{width // 8}", blocks=2)
    expected = [meaning(*row) % (1 << width) for row in zip(*(each.tolist() for each in columns), strict=True)]
    np.testing.assert_array_equal(found, np.array(expected, f"u{width // 8}"))


@pytest.mark.parametrize(("opcode", "n_sources", "width", "result", "meaning"), CASES, ids=[case[0] for case in CASES])
def test_instruction_means_what_the_isa_says(
    opcode: str, n_sources: int, width: int, result: int, meaning: PYTHON
) -> None:
    columns = operand_sets([width] * n_sources)
    if opcode.startswith(("div", "rem")):
        columns[1] = np.maximum(columns[1], 1)
    check(f"{opcode} %out, {', '.join(['%a', '%b', '%c'][:n_sources])};", columns, result, meaning)


@pytest.mark.parametrize(("opcode", "width", "meaning"), SHIFTS, ids=[case[0] for case in SHIFTS])
def test_shift_of_the_width_or_more_leaves_nothing_but_the_sign(opcode: str, width: int, meaning: PYTHON) -> None:
    check(f"{opcode} %out, %a, %b;", operand_sets([width, 32]), width, meaning)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_field_is_extracted_bit_by_bit(kind: str) -> None:
    width = int(kind[1:])
    columns = operand_sets([width, 32, 32])
    columns[1:] = [each % np.uint32(80) for each in columns[1:]]
    meaning = lambda a, b, c: field(a, b, c, width, kind[0] == "s")  # noqa: E731
    check(f"bfe.{kind} %out, %a, %b, %c;", columns, width, meaning)


@pytest.mark.parametrize("width", [32, 64])
def test_field_is_inserted_bit_by_bit(width: int) -> None:
    columns = operand_sets([width, width, 32, 32])
    columns[2:] = [each % np.uint32(80) for each in columns[2:]]
    columns[3] = columns[3][::-1].copy()
    meaning = lambda a, b, c, d: inserted(a, b, c, d, width)  # noqa: E731
    check(f"bfi.b{width} %out, %a, %b, %c, %d;", columns, width, meaning)


@pytest.mark.parametrize("table", [0x00, 0x6A, 0x96, 0xE8, 0xFE, 0xCA, 0xFF])
def test_lop3_looks_up_every_bit(table: int) -> None:
    def meaning(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    check(f"lop3.b32 %out, %a, %b, %c, {table};", operand_sets([32] * 3), 32, meaning)


def test_carry_joins_two_words() -> None:
    a, b = operand_sets([64, 64])
    for low, high, meaning in (
        ("add.cc.u32", "addc.u32", lambda x, y: x + y),
        ("sub.cc.u32", "subc.u32", lambda x, y: x - y),
    ):
        body = f"""
            mov.b64 {{%r4, %r5}}, %a;
            mov.b64 {{%r6, %r7}}, %b;
            {low} %r4, %r4, %r6;
            {high} %r5, %r5, %r7;
            mov.b64 %out, {{%r4, %r5}};"""
        check(body, [a, b], 64, meaning)


def test_carry_goes_through_a_word_and_out_of_it() -> None:
    a, b = operand_sets([64, 64])
    for name, meaning in (("add", lambda x, y: x + y >> 64), ("sub", lambda x, y: x - y >> 64)):
        body = f"""
            mov.b64 {{%r4, %r5}}, %a;
            mov.b64 {{%r6, %r7}}, %b;
            {name}.cc.u32 %r4, %r4, %r6;
            {name}c.cc.u32 %r5, %r5, %r7;
            {name}c.u32 %out, 0, 0;"""
        check(body, [a, b], 32, meaning)


def test_multiply_with_carry_makes_a_product_of_two_words() -> None:
    body = """
        mul.lo.u32 %r4, %a, %b;
        mul.hi.u32 %r5, %a, %b;
        mad.lo.cc.u32 %r4, %a, %b, %r4;
        madc.hi.u32 %r5, %a, %b, %r5;
        mov.b64 %out, {%r4, %r5};"""
    check(body, operand_sets([32, 32]), 64, lambda a, b: 2 * a * b)


def test_immediates_are_read_in_the_type_of_the_instruction() -> None:
    a = np.arange(64, dtype=np.uint32)
    assert evaluate("add.u32 %out, %a, -1;", a, out=np.uint32)[0] == 0xFFFFFFFF
    assert evaluate("or.b32 %out, %a, 0xF0000000U;", a, out=np.uint32)[1] == 0xF0000001
    assert evaluate("add.u32 %out, %a, 017;", a, out=np.uint32)[1] == 16
    assert evaluate("add.u32 %out, %a, 0b101;", a, out=np.uint32)[1] == 6
    assert evaluate("mov.f32 %out, 0f3F800000;", a, out=np.float32)[0] == 1
    assert evaluate("mov.f32 %out, 1.5;", a, out=np.float32)[0] == 1.5
