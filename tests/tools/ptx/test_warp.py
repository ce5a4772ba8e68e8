"""Shuffles, votes, reductions and matrix products of a warp, from the tables of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.tools.ptx import Memory, PtxError, execute
from tests.tools.ptx.snippets import HEADER, REGISTERS, evaluate
from tests.tools.ptx.toolchain import require_valid

LANES = np.arange(64, dtype=np.uint32)
MMA_S8 = "mma.sync.aligned.{}.row.col.s32.{}.{}.s32"


def shuffled(mode: str, lane: int, by: int, clamp: int, segment: int) -> tuple[int, bool]:
    """Source lane and validity, as the ISA's pseudo-code has them."""
    last = (lane & segment) | (clamp & ~segment & 31)
    first = lane & segment
    source, valid = {
        "up": (lane - by, lane - by >= last),
        "down": (lane + by, lane + by <= last),
        "bfly": (lane ^ by, lane ^ by <= last),
        "idx": (first | (by & ~segment & 31), (first | (by & ~segment & 31)) <= last),
    }[mode]
    return (source, True) if valid else (lane, False)


@pytest.mark.parametrize("by", [0, 1, 3, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 16, 8, 1])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle_follows_the_isa(mode: str, width: int, by: int) -> None:
    segment = 32 - width
    clamp = 0 if mode == "up" else 31
    values = LANES * np.uint32(1000) + np.uint32(7)
    body = f"""shfl.sync.{mode}.b32 %r4|%p0, %a, {by}, {segment << 8 | clamp}, 0xffffffff;
        selp.u32 %r5, 500000, 0, %p0; add.u32 %out, %r4, %r5;"""
    found = evaluate(body, values, out=np.uint32)
    for lane in range(64):
        source, valid = shuffled(mode, lane % 32, by, clamp, segment)
        assert found[lane] == values[lane // 32 * 32 + source] + (500000 if valid else 0)


def test_shuffle_within_a_part_of_the_warp() -> None:
    body = """setp.lt.u32 %p0, %index, 8; mov.u32 %r4, 99;
        @!%p0 bra END; shfl.sync.bfly.b32 %r4, %a, 4, 31, 0xff; END: mov.u32 %out, %r4;"""
    found = evaluate(body, LANES[:32], out=np.uint32)
    np.testing.assert_array_equal(found, [4, 5, 6, 7, 0, 1, 2, 3] + [99] * 24)


def test_shuffle_from_a_lane_that_takes_no_part_is_reported() -> None:
    body = """setp.lt.u32 %p0, %index, 8; @!%p0 bra END;
        shfl.sync.bfly.b32 %r4, %a, 8, 31, 0xff; END: mov.u32 %out, %r4;"""
    with pytest.raises(PtxError, match=r"reads lane 8, which does not take part; thread \(0, 0, 0\)"):
        evaluate(body, LANES[:32], out=np.uint32)


def test_shuffle_whose_members_never_come_is_reported() -> None:
    body = """setp.lt.u32 %p0, %index, 8; @!%p0 bra OTHER;
        shfl.sync.bfly.b32 %r4, %a, 1, 31, 0xffffffff; OTHER: bar.sync 0; mov.u32 %out, %r4;"""
    with pytest.raises(PtxError, match=r"membermask that never come; thread \(0, 0, 0\).*shfl"):
        evaluate(body, LANES[:32], out=np.uint32)


def test_shuffle_outside_of_the_own_mask_is_reported() -> None:
    with pytest.raises(PtxError, match=r"not in its own membermask; thread \(8, 0, 0\)"):
        evaluate("shfl.sync.bfly.b32 %out, %a, 1, 31, 0xff;", LANES, out=np.uint32)


def test_threads_of_a_warp_wait_for_those_that_come_from_further_down() -> None:
    """The odd threads reach the shuffle by a jump back: the even ones must not go on without them."""
    body = """and.b32 %r4, %index, 1; setp.eq.u32 %p0, %r4, 1; mov.u32 %r5, %a; @%p0 bra FAR;
        NEAR: shfl.sync.bfly.b32 %out, %r5, 1, 31, 0xffffffff; bra END;
        FAR: add.u32 %r5, %r5, 100; bra NEAR;
        END:"""
    found = evaluate(body, LANES, out=np.uint32)
    np.testing.assert_array_equal(found, [lane + 101 if lane % 2 == 0 else lane - 1 for lane in range(64)])


def test_threads_that_have_ended_are_not_waited_for() -> None:
    body = """setp.ge.u32 %p0, %index, 24; @%p0 exit;
        shfl.sync.idx.b32 %r4, %a, 23, 31, 0xffffffff; bar.sync 0; mov.u32 %out, %r4;"""
    found = evaluate(body, LANES[:32], out=np.uint32)
    np.testing.assert_array_equal(found, [23] * 24 + [0x5A5A5A5A] * 8)


def test_thread_that_has_ended_has_no_vote_and_nothing_to_read() -> None:
    head = "setp.ge.u32 %p0, %index, 24; @%p0 exit; setp.lt.u32 %p1, %index, 24;"
    found = evaluate(head + "vote.sync.all.pred %p2, %p1, -1; selp.u32 %out, 1, 0, %p2;", LANES[:32], out=np.uint32)
    assert found[:24].tolist() == [1] * 24
    with pytest.raises(PtxError, match="reads lane 30, which does not take part"):
        evaluate(head + "shfl.sync.idx.b32 %out, %a, 30, 31, -1;", LANES[:32], out=np.uint32)


@pytest.mark.parametrize("bits", [0x00000000, 0xFFFFFFFF, 0x80000001, 0x00F0F00F])
def test_votes_count_every_member(bits: int) -> None:
    head = f"shr.u32 %r4, {bits}, %index; and.b32 %r4, %r4, 1; setp.ne.u32 %p0, %r4, 0;"
    mine = np.arange(32, dtype=np.uint32)
    ballot = evaluate(head + "vote.sync.ballot.b32 %out, %p0, 0xffffffff;", mine, out=np.uint32)
    assert (ballot == bits).all()
    inverse = evaluate(head + "vote.sync.ballot.b32 %out, !%p0, 0xffffffff;", mine, out=np.uint32)
    assert (inverse == bits ^ 0xFFFFFFFF).all()
    for mode, expected in (("any", bits != 0), ("all", bits == 0xFFFFFFFF), ("uni", bits in (0, 0xFFFFFFFF))):
        body = head + f"vote.sync.{mode}.pred %p1, %p0, 0xffffffff; selp.u32 %out, 1, 0, %p1;"
        assert (evaluate(body, mine, out=np.uint32) == expected).all()


def test_votes_of_two_warps_are_apart() -> None:
    body = "setp.ge.u32 %p0, %index, 40; vote.sync.ballot.b32 %out, %p0, 0xffffffff;"
    assert evaluate(body, LANES, out=np.uint32).tolist() == [0] * 32 + [0xFFFFFF00] * 32


def test_activemask_is_who_is_here() -> None:
    body = "mov.u32 %r4, 0; setp.lt.u32 %p0, %index, 5; @%p0 activemask.b32 %r4; mov.u32 %out, %r4;"
    assert evaluate(body, LANES[:32], out=np.uint32).tolist() == [31] * 5 + [0] * 27


@pytest.mark.parametrize(
    ("operation", "reduced"),
    [
        ("add.s32", np.add.reduce), ("min.s32", np.minimum.reduce), ("max.s32", np.maximum.reduce),
        ("and.b32", np.bitwise_and.reduce), ("or.b32", np.bitwise_or.reduce), ("xor.b32", np.bitwise_xor.reduce),
    ],
)  # fmt: skip
def test_warp_is_reduced(operation: str, reduced: Callable[..., Any]) -> None:
    values = np.random.default_rng(0).integers(-(2**31), 2**31, 64).astype(np.int32)
    found = evaluate(f"redux.sync.{operation} %out, %a, 0xffffffff;", values, out=np.int32)
    expected = [reduced(values[start : start + 32], dtype=np.int32) for start in (0, 32)]
    np.testing.assert_array_equal(found, np.repeat(expected, 32))


def test_lane_masks_are_powers_of_two() -> None:
    for which, expected in (("eq", 1 << 5), ("lt", 31), ("le", 63), ("gt", 0xFFFFFFC0), ("ge", 0xFFFFFFE0)):
        assert evaluate(f"mov.u32 %out, %lanemask_{which};", LANES, out=np.uint32)[37] == expected


class Tile:
    """Where the ISA's tables put element i of a thread's part of A, B and C: (row, column)."""

    def __init__(self, shape: str, is_half: bool) -> None:
        self.n_rows = 8 if shape.startswith("m8") else 16
        self.depth = int(shape.split("k")[1])
        self.n_a, self.n_b = self.n_rows * self.depth // 32, 8 * self.depth // 32
        self.group = 2 if is_half else 4

    def a(self, lane: int, i: int) -> tuple[int, int]:
        four = i // self.group
        return lane // 4 + 8 * (four % 2 if self.n_rows == 16 else 0), self._along(
            lane, i, four // 2 if self.n_rows == 16 else four
        )

    def b(self, lane: int, i: int) -> tuple[int, int]:
        return self._along(lane, i, i // self.group), lane // 4

    def c(self, lane: int, i: int) -> tuple[int, int]:
        return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2

    def _along(self, lane: int, i: int, step: int) -> int:
        return lane % 4 * self.group + i % self.group + step * 4 * self.group


def product(opcode: str, tile: Tile, dtype: Any, result: Any) -> tuple[np.ndarray, np.ndarray]:
    """What mma makes of two random tiles and 1000 (row) + column in C, and what it should."""
    generator = np.random.default_rng(tile.depth)
    info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
    a, b = (
        (generator.integers(info.min, info.max + 1, shape) if info else generator.integers(-8, 8, shape)).astype(dtype)
        for shape in ((tile.n_rows, tile.depth), (tile.depth, 8))
    )
    c = (np.arange(tile.n_rows)[:, None] * 1000 + np.arange(8)).astype(result)
    spread = [
        np.array([[matrix[place(lane, i)] for i in range(n)] for lane in range(32)], matrix.dtype)
        for matrix, place, n in ((a, tile.a, tile.n_a), (b, tile.b, tile.n_b), (c, tile.c, tile.n_rows // 4))
    ]
    memory, out = Memory(), np.zeros(32 * tile.n_rows // 4, result)
    counts = [each.nbytes // 32 // 4 for each in spread]
    names, loads = [], []
    for k, count in enumerate(counts):
        names.append([f"%m{k}_{i}" for i in range(count)])
        loads.append(f".reg .b32 {', '.join(names[-1])}; ld.param.u64 %at, [p{k}];")
        loads += [
            f"mad.wide.u32 %rd0, %index, {4 * count}, %at; ld.global.b32 {name}, [%rd0+{4 * i}];"
            for i, name in enumerate(names[-1])
        ]
    lists = ["{" + ", ".join(each) + "}" for each in names]
    stores = [f"st.global.b32 [%rd1+{4 * i}], {name};" for i, name in enumerate(names[2])]
    text = f"""{HEADER}.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3) {{ {REGISTERS}
        mov.u32 %index, %tid.x; {" ".join(loads)} {opcode} {lists[2]}, {lists[0]}, {lists[1]}, {lists[2]};
        ld.param.u64 %at, [p3]; mad.wide.u32 %rd1, %index, {4 * counts[2]}, %at; {" ".join(stores)} ret; }}"""
    require_valid(text, (9, 0))
    execute(text, 1, 32, [memory.place(each) for each in (*spread, out)], memory)
    found = np.zeros_like(c)
    for lane in range(32):
        for i in range(tile.n_rows // 4):
            found[tile.c(lane, i)] = out[lane * tile.n_rows // 4 + i]
    wide = np.int64 if info else np.float64
    return found, (a.astype(wide) @ b.astype(wide) + c).astype(result)


@pytest.mark.parametrize("kind", ["s8", "u8"])
@pytest.mark.parametrize("shape", ["m16n8k32", "m16n8k16", "m8n8k16"])
def test_product_of_bytes_is_exact(shape: str, kind: str) -> None:
    tile, dtype = Tile(shape, is_half=False), {"s8": np.int8, "u8": np.uint8}[kind]
    found, expected = product(MMA_S8.format(shape, kind, kind), tile, dtype, np.int32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k8"])
def test_product_of_halves_is_that_of_the_numbers(shape: str) -> None:
    opcode = f"mma.sync.aligned.{shape}.row.col.f32.f16.f16.f32"
    found, expected = product(opcode, Tile(shape, is_half=True), np.float16, np.float32)
    np.testing.assert_array_equal(found, expected)


def test_product_by_a_part_of_the_warp_is_reported() -> None:
    body = f"{MMA_S8.format('m8n8k16', 's8', 's8')} {{%out, %r4}}, {{%a}}, {{%a}}, {{%a, %a}};"
    with pytest.raises(PtxError, match="part of the warp"):
        evaluate(body, LANES[:24], out=np.uint32)


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_are_loaded_row_by_row(count: int, transposed: str) -> None:
    """Lane 8i + r gives the address of row r of matrix i; lane l gets elements (l / 4, 2 (l % 4)) and the next."""
    halves = np.random.default_rng(1).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1)
    names = [f"%r{4 + i}" for i in range(count)]
    memory, out = Memory(), np.zeros(32 * count, np.uint32)
    stores = " ".join(f"st.global.b32 [%rd5+{4 * i}], {name};" for i, name in enumerate(names))
    # Rows lie 48 bytes apart, matrices after each other, so that no row is where a plain copy has it.
    text = f"""{HEADER}.visible .entry k(.param .u64 p0, .param .u64 p1) {{ {REGISTERS}
        .shared .align 16 .b8 tile[1536];
        mov.u32 %index, %tid.x; ld.param.u64 %rd0, [p0]; mad.wide.u32 %rd1, %index, 16, %rd0;
        ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%rd1];
        mov.u64 %rd2, tile; mad.wide.u32 %rd3, %index, 48, %rd2; st.shared.v4.u32 [%rd3], {{%r0, %r1, %r2, %r3}};
        bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{", ".join(names)}}}, [%rd3];
        ld.param.u64 %rd4, [p1]; mad.wide.u32 %rd5, %index, {4 * count}, %rd4; {stores} ret; }}"""
    require_valid(text, (9, 0))
    execute(text, 1, 32, [memory.place(words), memory.place(out)], memory)
    found = out.view(np.uint16).reshape(32, count, 2)
    for lane in range(32):
        for i in range(count):
            matrix = halves[i].T if transposed else halves[i]
            np.testing.assert_array_equal(found[lane, i], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


def test_threads_exchange_from_both_sides_of_a_branch() -> None:
    """The ISA asks for the same qualifiers and mask, not for the same instruction; compilers split loops so."""
    body = """setp.lt.u32 %p0, %index, 7; mov.u32 %r4, 1; mov.u32 %r5, 40; @%p0 bra LOW;
        shfl.sync.bfly.b32 %r6, %a, %r4, 31, 0xffffffff; add.u32 %out, %r6, %r5; bra END;
        LOW: shfl.sync.bfly.b32 %out, %a, 1, 31, 0xffffffff; END:"""
    found = evaluate(body, LANES, out=np.uint32)
    np.testing.assert_array_equal(found, [(i ^ 1) + (40 if i >= 7 else 0) for i in range(64)])
    other = body.replace("LOW: shfl.sync.bfly", "LOW: shfl.sync.idx")
    with pytest.raises(PtxError, match="never come"):
        evaluate(other, LANES, out=np.uint32)
