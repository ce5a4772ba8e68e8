"""Branches, barriers, predicates, calls and the text itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.tools.ptx import Memory, PtxError, execute
from tests.tools.ptx.snippets import HEADER, REGISTERS, evaluate

LANES = np.arange(64, dtype=np.uint32)


def test_loops_of_different_lengths_meet_again() -> None:
    """Thread i adds 1 + 2 + ... + i; then all vote together."""
    body = """mov.u32 %r4, 0; mov.u32 %r5, 0;
        LOOP: setp.ge.u32 %p0, %r5, %a; @%p0 bra DONE; add.u32 %r5, %r5, 1; add.u32 %r4, %r4, %r5; bra.uni LOOP;
        DONE: activemask.b32 %r6; setp.ne.u32 %p1, %r6, 0xffffffff; @%p1 trap; mov.u32 %out, %r4;"""
    found = evaluate(body, LANES, out=np.uint32)
    np.testing.assert_array_equal(found, LANES * (LANES + 1) // 2)


def test_nested_branches_give_each_thread_its_own_way() -> None:
    body = """and.b32 %r4, %a, 1; and.b32 %r5, %a, 2; setp.ne.u32 %p0, %r4, 0; setp.ne.u32 %p1, %r5, 0;
        @%p0 bra ODD; @%p1 bra TWO; mov.u32 %r6, 10; bra END; TWO: mov.u32 %r6, 12; bra END;
        ODD: @!%p1 bra ONE; mov.u32 %r6, 13; bra END; ONE: mov.u32 %r6, 11; END: mov.u32 %out, %r6;"""
    np.testing.assert_array_equal(evaluate(body, LANES, out=np.uint32), LANES % 4 + 10)


def test_guarded_instruction_leaves_the_others_alone() -> None:
    body = """mov.u32 %r4, 1; mov.u32 %r5, %r4; setp.lt.u32 %p0, %a, 7; @%p0 mov.u32 %r4, 2;
        @!%p0 add.u32 %r4, %r4, 4; shl.b32 %r4, %r4, 4; or.b32 %out, %r4, %r5;"""
    assert evaluate(body, LANES, out=np.uint32).tolist() == [0x21] * 7 + [0x51] * 57


def test_guard_that_all_here_fulfil_leaves_those_elsewhere_alone() -> None:
    body = """mov.u32 %r4, 5; setp.lt.u32 %p0, %a, 32; setp.ge.u32 %p1, %a, 0; @%p0 bra FAR;
        @%p1 mov.u32 %r4, 9; bra END; FAR: add.u32 %r4, %r4, 1; END: mov.u32 %out, %r4;"""
    assert evaluate(body, LANES, out=np.uint32).tolist() == [6] * 32 + [9] * 32


@pytest.mark.parametrize("n_threads", [1, 31, 33, 95])
def test_block_need_not_be_whole_warps(n_threads: int) -> None:
    values = np.arange(n_threads, dtype=np.uint32)
    body = "bar.sync 0; vote.sync.ballot.b32 %r4, 1, 0xffffffff; popc.b32 %out, %r4;"
    body = "setp.eq.u32 %p0, 0, 0; " + body.replace(" 1,", " %p0,")
    found = evaluate(body, values, out=np.uint32)
    assert found.tolist() == [min(32, n_threads - i // 32 * 32) for i in range(n_threads)]


def test_grid_and_block_have_three_axes() -> None:
    """The thread's running number, x fastest, and the block's after it: every slot is written by the right one."""
    axes = ["%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"]
    extents = ["%ntid.x", "%ntid.y", "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"]
    body = "mov.u32 %r0, 0;" + "".join(
        f"mov.u32 %r1, {extent}; mov.u32 %r2, {axis}; mad.lo.u32 %r0, %r0, %r1, %r2;"
        for axis, extent in zip(axes[::-1], extents[::-1], strict=True)
    )
    text = f"""{HEADER}.visible .entry k(.param .u64 p) {{ {REGISTERS} {body}
        mov.u32 %r3, %tid.y; mul.lo.u32 %r3, %r3, 1000; mov.u32 %r4, %ctaid.z; add.u32 %r3, %r3, %r4;
        ld.param.u64 %rd0, [p]; mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r3; ret; }}"""
    memory, out = Memory(), np.full((2, 3, 4, 2, 5, 3), -1, np.int32)
    execute(text, (4, 3, 2), (3, 5, 2), [memory.place(out)], memory)
    expected = np.arange(5)[:, None] * 1000 + np.arange(2)[:, None, None, None, None, None]
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))


def test_barrier_that_a_part_of_the_block_misses_is_reported() -> None:
    body = "setp.lt.u32 %p0, %a, 40; @%p0 bra A; bar.sync 0; bra END; A: bar.sync 0; END: mov.u32 %out, 0;"
    with pytest.raises(PtxError, match=r"divergent barrier.*line \d+: bar.sync 0"):
        evaluate(body, LANES, out=np.uint32)


def test_barrier_under_a_predicate_is_reported_when_threads_wait_elsewhere() -> None:
    body = "setp.lt.u32 %p0, %a, 40; @%p0 bar.sync 0; add.u32 %r4, %a, 1; bar.sync 0; mov.u32 %out, %r4;"
    with pytest.raises(PtxError, match="divergent barrier"):
        evaluate(body, LANES, out=np.uint32)


def test_blocks_pass_their_barriers_apart() -> None:
    """Block b passes b barriers: together in one group, they must not wait for each other."""
    body = """mov.u32 %r4, %ctaid.x; mov.u32 %r5, 0;
        LOOP: setp.ge.u32 %p0, %r5, %r4; @%p0 bra DONE; bar.sync 0; add.u32 %r5, %r5, 1; bra LOOP;
        DONE: mov.u32 %out, %r5;"""
    found = evaluate(body, np.arange(160, dtype=np.uint32), out=np.uint32, blocks=5)
    np.testing.assert_array_equal(found, np.repeat(np.arange(5), 32))


def test_barrier_reduces_predicates() -> None:
    head = "setp.lt.u32 %p0, %a, 40;"
    assert (evaluate(head + "barrier.sync 0; bar.red.popc.u32 %out, 0, %p0;", LANES, out=np.uint32) == 40).all()
    for operation, expected in (("and", 0), ("or", 1)):
        body = head + f"bar.red.{operation}.pred %p1, 0, %p0; selp.u32 %out, 1, 0, %p1;"
        assert (evaluate(body, LANES, out=np.uint32) == expected).all()


def test_kernel_that_does_not_end_is_reported() -> None:
    memory = Memory()
    text = f"{HEADER}.visible .entry k() {{ LOOP: bra LOOP; }}"
    with pytest.raises(PtxError, match="too many instructions"):
        execute(text, 1, 32, [], memory, max_steps=1000)


def test_division_by_zero_is_reported_where_a_thread_does_it() -> None:
    body = "setp.ne.u32 %p0, %a, 0; mov.u32 %out, 0; {} div.u32 %out, %a, %a;"
    with pytest.raises(PtxError, match=r"division by zero; thread \(0, 0, 0\)"):
        evaluate(body.format(""), LANES, out=np.uint32)
    assert evaluate(body.format("@%p0"), LANES, out=np.uint32).tolist() == [0] + [1] * 63


COMPARISONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats_are_false_or_true_with_nan(name: str) -> None:
    values = np.array([0.0, -0.0, 1.5, -2.0, np.inf, np.nan], np.float32)
    a, b = values.repeat(6), np.tile(values, 6)
    for suffix, with_nan in (("", False), ("u", True)):
        found = evaluate(f"setp.{name}{suffix}.f32 %p0, %a, %b; selp.u32 %out, 1, 0, %p0;", a, b, out=np.uint32)
        expected = [
            with_nan if math.isnan(x) or math.isnan(y) else COMPARISONS[name](x, y)
            for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("kind", ["u32", "s32", "u16", "s64"])
def test_comparisons_of_integers_know_the_sign(name: str, kind: str) -> None:
    dtype = f"{kind[0]}{int(kind[1:]) // 8}".replace("s", "i")
    values = np.array([0, 1, -1, 7], np.int64).astype(dtype)
    a, b = values.repeat(4), np.tile(values, 4)
    found = evaluate(f"setp.{name}.{kind} %p0, %a, %b; selp.u32 %out, 1, 0, %p0;", a, b, out=np.uint32)
    np.testing.assert_array_equal(found, COMPARISONS[name](a, b))


def test_comparisons_join_another_predicate_and_give_the_opposite() -> None:
    body = """setp.ge.u32 %p0, %a, 8; setp.lt.{}.u32 %p1|%p2, %a, 16, {}%p0;
        selp.u32 %r4, 1, 0, %p1; selp.u32 %r5, 2, 0, %p2; add.u32 %out, %r4, %r5;"""
    a = LANES
    for join, meaning in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for sign in ("", "!"):
            third = a >= 8 if not sign else a < 8
            found = evaluate(body.format(join, sign), a, out=np.uint32)
            np.testing.assert_array_equal(found, meaning(a < 16, third) + 2 * meaning(a >= 16, third))
    assert evaluate("setp.nan.f32 %p0, %a, %a; selp.u32 %out, 1, 0, %p0;", np.full(32, np.nan, "f4"), out="u4").all()
    assert evaluate("setp.hi.u32 %p0, %a, 5; selp.u32 %out, 1, 0, %p0;", a, out="u4").tolist() == [0] * 6 + [1] * 58


def test_selection_by_sign_and_test_of_properties() -> None:
    found = evaluate("slct.u32.s32 %out, 1, 2, %a;", np.array([-1, 0, 1] * 10, np.int32), out=np.uint32)
    assert found[:3].tolist() == [2, 1, 1]
    values = np.array([1.0, np.inf, np.nan, 1e-40], np.float32).repeat(8)
    for name, expected in (("finite", [1, 0, 0, 1]), ("notanumber", [0, 0, 1, 0]), ("subnormal", [0, 0, 0, 1])):
        found = evaluate(f"testp.{name}.f32 %p0, %a; selp.u32 %out, 1, 0, %p0;", values, out=np.uint32)
        assert found[::8].tolist() == expected


def test_words_are_taken_apart_and_put_together() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 32, 64).astype(np.uint32)
    found = evaluate("mov.b32 {%h0, %h1}, %a; mov.b32 %out, {%h1, %h0};", values, out=np.uint32)
    np.testing.assert_array_equal(found, values >> np.uint32(16) | values << np.uint32(16))
    wide = values.astype(np.uint64) * np.uint64(0x100000001)
    found = evaluate("mov.b64 {_, %r4}, %a; mov.b64 %out, {%r4, 0};", wide, out=np.uint64)
    np.testing.assert_array_equal(found, wide >> np.uint64(32))
