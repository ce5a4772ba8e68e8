"""Loads, stores, atomics and asynchronous copies; and that every wrong access is reported, with its thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.ptx import Memory, PtxError, Trace, execute
from tests.tools.ptx.snippets import HEADER, evaluate, run

Array = np.ndarray[Any, Any]
DYNAMIC = ".extern .shared .align 16 .b8 dynamic[];\n"
STATIC = ".shared .align 16 .b8 tile[1024];\n.shared .align 4 .b8 other[64];\n"


def numbers(n: int, dtype: Any = np.uint32) -> Array:
    return np.random.default_rng(n).integers(1, 120, n).astype(dtype)


@pytest.mark.parametrize(
    "hints", ["", ".nc", ".ca", ".cg", ".cs", ".volatile", ".nc.L1::no_allocate", ".nc.L1::no_allocate.L2::128B"]
)
def test_vectors_move_whole(hints: str) -> None:
    x, out = numbers(128), np.zeros(128, np.uint32)
    space = f"{hints}.global" if hints == ".volatile" else f".global{hints}"
    run(
        f"""mul.wide.u32 %rd4, %index, 16; add.u64 %rd5, %rd0, %rd4; add.u64 %rd6, %rd1, %rd4;
        ld{space}.v4.u32 {{%r0, %r1, %r2, %r3}}, [%rd5];
        st.global.v2.u32 [%rd6], {{%r3, %r2}}; st.global.v2.b32 [%rd6+8], {{%r1, %r0}}; ret;""",
        x, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out.reshape(-1, 4), x.reshape(-1, 4)[:, ::-1])


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32"])
def test_narrow_loads_are_extended_by_their_type(kind: str) -> None:
    dtype = np.dtype(f"{kind[0]}{int(kind[1:]) // 8}".replace("s", "i"))
    x, out = np.arange(-16, 16).astype(dtype), np.zeros(32, np.int64)
    run(
        f"""mad.wide.u32 %rd4, %index, {dtype.itemsize}, %rd0; mad.wide.u32 %rd5, %index, 8, %rd1;
        ld.global.{kind} %rd6, [%rd4]; st.global.u64 [%rd5], %rd6; ret;""",
        x, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x.astype(np.int64))


def test_narrow_stores_leave_their_neighbours() -> None:
    x, out = numbers(32), np.full(64, 200, np.uint8)
    run(
        """mad.wide.u32 %rd4, %index, 4, %rd0; mad.wide.u32 %rd5, %index, 2, %rd1;
        ld.global.u32 %r0, [%rd4]; or.b32 %r0, %r0, 0xABCD00; st.global.u8 [%rd5+1], %r0; ret;""",
        x, out,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.stack([np.full(32, 200), x], 1).reshape(-1))


def test_shared_local_and_module_variables_hold_values() -> None:
    x, out = numbers(32), np.zeros(32, np.uint32)
    head = STATIC + ".const .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};\n.global .align 4 .u32 count = 7;\n"
    run(
        """.local .align 8 .b8 depot[16];
        mul.wide.u32 %rd4, %index, 4; add.u64 %rd5, %rd0, %rd4; ld.global.u32 %r0, [%rd5];
        mov.u64 %rd6, tile; add.u64 %rd6, %rd6, %rd4; st.shared.u32 [%rd6], %r0;
        bar.sync 0;
        xor.b32 %r1, %index, 31; mul.wide.u32 %rd7, %r1, 4; mov.u64 %rd6, tile; cvta.shared.u64 %rd6, %rd6;
        add.u64 %rd6, %rd6, %rd7; ld.u32 %r2, [%rd6];
        mov.u64 %rd8, depot; cvta.local.u64 %rd9, %rd8; st.local.u32 [depot+8], %r2; ld.u32 %r3, [%rd9+8];
        ld.const.u32 %r4, [table+4]; add.u32 %r3, %r3, %r4; ld.global.u32 %r5, [count]; add.u32 %r3, %r3, %r5;
        add.u64 %rd10, %rd1, %rd4; st.global.u32 [%rd10], %r3; ret;""",
        x, out, head=head,
    )  # fmt: skip
    np.testing.assert_array_equal(out, x[::-1] + np.uint32(0x08070605 + 7))


def test_generic_addresses_know_their_space() -> None:
    out = np.zeros(32, np.uint32)
    run(
        """mov.u64 %rd1, tile; cvta.shared.u64 %rd1, %rd1;
        isspacep.shared %p0, %rd1; isspacep.global %p1, %rd1; isspacep.global %p2, %rd0; isspacep.local %p3, %rd0;
        selp.u32 %r0, 1, 0, %p0; selp.u32 %r1, 2, 0, %p1; selp.u32 %r2, 4, 0, %p2; selp.u32 %r3, 8, 0, %p3;
        add.u32 %r0, %r0, %r1; add.u32 %r0, %r0, %r2; add.u32 %r0, %r0, %r3;
        mad.wide.u32 %rd4, %index, 4, %rd0; st.global.u32 [%rd4], %r0; ret;""",
        out, head=STATIC,
    )  # fmt: skip
    assert (out == 1 + 4).all()


ATOMICS = {
    "add.u32": lambda old, x: (old + x.sum()) % (1 << 32), "max.u32": lambda old, x: max(old, x.max()),
    "min.s32": lambda old, x: min(old, x.min()), "or.b32": lambda old, x: old | np.bitwise_or.reduce(x),
    "and.b32": lambda old, x: old & np.bitwise_and.reduce(x), "xor.b32": lambda old, x: old ^ np.bitwise_xor.reduce(x),
    "inc.u32": lambda old, x: None, "exch.b32": lambda old, x: x[-1],
}  # fmt: skip


@pytest.mark.parametrize("n_places", [1, 64])
@pytest.mark.parametrize("operation", [name for name in ATOMICS if name != "inc.u32"])
def test_atomics_come_one_after_the_other(operation: str, n_places: int) -> None:
    """Whether all threads meet at one address or few do, old values and the last one fit one order of the threads."""
    x, total, old = numbers(128), np.full(n_places, 77, np.uint32), np.zeros(128, np.uint32)
    run(
        f"""mul.wide.u32 %rd4, %index, 4; add.u64 %rd5, %rd0, %rd4; ld.global.u32 %r0, [%rd5];
        and.b32 %r1, %index, {n_places - 1}; mad.wide.u32 %rd6, %r1, 4, %rd1;
        atom.global.{operation} %r2, [%rd6], %r0; add.u64 %rd7, %rd2, %rd4; st.global.u32 [%rd7], %r2; ret;""",
        x, total, old, block=128,
    )  # fmt: skip
    for place in range(n_places):
        mine = x[place::n_places]
        assert total[place] == ATOMICS[operation](77, mine)
        assert old[place] == 77
        for i in range(1, len(mine)):
            assert old[place + i * n_places] == ATOMICS[operation](77, mine[:i])


def test_reductions_of_blocks_add_up_in_shared_and_global_memory() -> None:
    total = np.zeros(1, np.uint32)
    fsum = np.zeros(1, np.float32)
    run(
        """setp.eq.u32 %p0, %index, 0; mov.u64 %rd4, other;
        @%p0 st.shared.u32 [%rd4], 0; bar.sync 0;
        red.shared.add.u32 [%rd4], %index; bar.sync 0;
        @!%p0 ret;
        ld.shared.u32 %r0, [%rd4]; red.global.add.u32 [%rd0], %r0;
        red.relaxed.gpu.global.add.f32 [%rd1], 0f3F000000; ret;""",
        total, fsum, head=STATIC, block=96, grid=5,
    )  # fmt: skip
    assert total[0] == 5 * sum(range(96))
    assert fsum[0] == 2.5


def test_compare_and_swap_gives_the_lock_to_one() -> None:
    lock, out = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    run(
        """add.u32 %r0, %index, 1; atom.global.cas.b32 %r1, [%rd0], 0, %r0;
        mad.wide.u32 %rd4, %index, 4, %rd1; st.global.u32 [%rd4], %r1; ret;""",
        lock, out, block=64,
    )  # fmt: skip
    assert lock[0] == 1
    assert (out == [0] + [1] * 63).all()


def test_atomic_counter_wraps() -> None:
    counter = np.zeros(1, np.uint32)
    run("atom.global.inc.u32 %r0, [%rd0], 4; ret;", counter)
    assert counter[0] == 32 % 5


COPY = """
    mul.wide.u32 %rd4, %index, 16; add.u64 %rd5, %rd0, %rd4; mov.u64 %rd6, tile; add.u64 %rd7, %rd6, %rd4;
    cp.async.cg.shared.global [%rd7], [%rd5], 16{size}; cp.async.commit_group;
    {wait}
    {barrier}
    xor.b32 %r1, %index, 31; mad.wide.u32 %rd8, %r1, 16, %rd6; ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [%rd8];
    add.u64 %rd9, %rd1, %rd4; st.global.v4.u32 [%rd9], {{%r2, %r3, %r4, %r5}}; ret;"""


def copied(size: str = "", wait: str = "cp.async.wait_group 0;", barrier: str = "bar.sync 0;") -> tuple[Array, Array]:
    x, out = numbers(128), np.zeros(128, np.uint32)
    run(COPY.format(size=size, wait=wait, barrier=barrier), x, out, head=STATIC)
    return x.reshape(32, 4), out.reshape(32, 4)


def test_asynchronous_copy_arrives() -> None:
    x, out = copied()
    np.testing.assert_array_equal(out, x[::-1])
    x, out = copied(wait="cp.async.wait_all;")
    np.testing.assert_array_equal(out, x[::-1])


def test_asynchronous_copy_fills_with_zeros() -> None:
    x, out = copied(size=", 8")
    np.testing.assert_array_equal(out[:, :2], x[::-1, :2])
    assert (out[:, 2:] == 0).all()


def test_asynchronous_copy_that_is_not_waited_for_is_reported() -> None:
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PtxError, match="in flight"):
            copied(wait=wait)


def test_asynchronous_copy_of_another_thread_needs_a_barrier() -> None:
    with pytest.raises(PtxError, match="races with a write"):
        copied(barrier="")


def test_older_group_has_landed_while_the_newer_is_in_flight() -> None:
    x, out = numbers(64), np.zeros(32, np.uint32)
    body = """
        mul.wide.u32 %rd4, %index, 4; add.u64 %rd5, %rd0, %rd4; mov.u64 %rd6, tile; add.u64 %rd7, %rd6, %rd4;
        cp.async.ca.shared.global [%rd7], [%rd5], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%rd7+128], [%rd5+128], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.u32 %r0, [%rd7{}]; add.u64 %rd9, %rd1, %rd4; st.global.u32 [%rd9], %r0; ret;"""
    run(body.format(""), x, out, head=STATIC)
    np.testing.assert_array_equal(out, x[:32])
    with pytest.raises(PtxError, match="in flight"):
        run(body.format("+128"), x, out, head=STATIC)


def store_at(address: str, *arrays: Array, **options: Any) -> None:
    run(f"{address} st.global.u32 [%rd4], %index; ret;", *arrays, **options)


def test_access_outside_an_array_names_thread_line_and_address() -> None:
    x, after = np.zeros(31, np.uint32), np.zeros(100, np.uint32)
    message = (
        r"4 bytes at 0x10007c, 4 past the end of the array at 0x100000 \(124 bytes\); thread \(31, 0, 0\) of block 0"
    )
    with pytest.raises(PtxError, match=message + r", line \d+: st.global.u32 \[%rd4\], %index"):
        store_at("mad.wide.u32 %rd4, %index, 4, %rd0;", x, after)
    with pytest.raises(PtxError, match="where nothing is placed; thread \\(0, 0, 0\\)"):
        store_at("sub.u64 %rd4, %rd0, 4;", x)
    with pytest.raises(PtxError, match="where nothing is placed"):
        store_at("mov.u64 %rd4, 0;", x)


def test_load_outside_an_array_is_reported_in_the_block_that_does_it() -> None:
    with pytest.raises(PtxError, match=r"past the end.*thread \(2, 0, 0\) of block 3.*ld.global.u32"):
        run(
            """mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, 4, %index; mad.wide.u32 %rd4, %r0, 4, %rd0;
            ld.global.u32 %r1, [%rd4]; ret;""",
            np.zeros(14, np.uint32), block=4, grid=4,
        )  # fmt: skip


def test_misaligned_access_is_reported() -> None:
    with pytest.raises(PtxError, match=r"misaligned access: 4 bytes at 0x100001"):
        store_at("add.u64 %rd4, %rd0, 1;", np.zeros(8, np.uint32))
    with pytest.raises(PtxError, match=r"misaligned access: 16 bytes at 0x100008"):
        run("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%rd0+8]; ret;", np.zeros(8, np.uint32))


def test_store_to_a_read_only_array_is_reported() -> None:
    x = np.zeros(32, np.uint32)
    x.flags.writeable = False
    with pytest.raises(PtxError, match="read-only"):
        store_at("mad.wide.u32 %rd4, %index, 4, %rd0;", x)


def test_array_with_gaps_cannot_be_placed() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        Memory().place(np.zeros((4, 4))[:, ::2])


def shared(body: str, block: int = 32, head: str = STATIC, **options: Any) -> Trace:
    return run(
        f"mov.u64 %rd4, tile; mad.wide.u32 %rd5, %index, 4, %rd4; {body} ret;", block=block, head=head, **options
    )


def test_shared_memory_that_was_never_written_is_reported() -> None:
    with pytest.raises(PtxError, match=r"never written.*thread \(0, 0, 0\)"):
        shared("ld.shared.u32 %r0, [%rd5];")
    with pytest.raises(PtxError, match=r"never written.*thread \(31, 0, 0\)"):
        shared("st.shared.u32 [%rd5], 1; bar.sync 0; ld.shared.u32 %r0, [%rd5+4];")


def test_shared_access_outside_of_a_variable_is_reported() -> None:
    with pytest.raises(PtxError, match=r"outside of every variable; thread \(0, 0, 0\)"):
        shared("st.shared.u32 [%rd5+1024], 1;")
    with pytest.raises(PtxError, match="outside of every variable"):
        shared("st.shared.u32 [%rd5+100000], 1;")
    with pytest.raises(PtxError, match="outside of every variable"):
        shared("st.shared.u32 [%rd5+-4], 1;")


def test_dynamic_shared_memory_ends_where_the_launch_says() -> None:
    body = "mov.u64 %rd4, dynamic; mad.wide.u32 %rd5, %index, 4, %rd4; st.shared.u32 [%rd5], 1; ret;"
    run(body, head=DYNAMIC, shared_bytes=128)
    with pytest.raises(PtxError, match=r"outside of every variable; thread \(31, 0, 0\)"):
        run(body, head=DYNAMIC, shared_bytes=124)


def test_local_memory_that_was_never_written_is_reported() -> None:
    with pytest.raises(PtxError, match=r"local memory .* never written"):
        run(".local .align 4 .b8 depot[8]; ld.local.u32 %r0, [depot+4]; ret;")


def test_vector_access_needs_the_alignment_that_is_declared() -> None:
    with pytest.raises(PtxError, match="misaligned"):
        shared("st.shared.v4.u32 [other], {%r0, %r0, %r0, %r0};", block=1)


def test_launches_may_overwrite_each_other() -> None:
    """The first launch's block 0 and the second's block 1 store to one address: one comes after the other."""
    text = f"""{HEADER}.visible .entry k(.param .u64 p, .param .u32 writer) {{
        .reg .b64 %rd<2>; .reg .b32 %r<4>; .reg .pred %p0; ld.param.u64 %rd0, [p]; ld.param.u32 %r2, [writer];
        mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r1, %r2; @%p0 exit;
        mad.wide.u32 %rd1, %r0, 4, %rd0; st.global.u32 [%rd1], %r1; ret; }}"""
    memory, out = Memory(), np.full(32, 9, np.uint32)
    address = memory.place(out)
    for writer in (0, 1):
        execute(text, 2, 32, [address, writer], memory)
        assert (out == writer).all()


def test_bytes_moved_are_counted() -> None:
    x = numbers(32)
    body = "mad.wide.u32 %rd4, %index, 4, %rd0; ld.global.u32 %r0, [%rd4]; st.global.u8 [%rd4], %r0; ret;"
    trace = run(body, x)
    assert (trace.loaded_bytes["global"], trace.stored_bytes["global"]) == (128, 32)


def test_unwritten_register_holds_nothing_useful() -> None:
    assert evaluate("mov.b32 %out, %r9;", numbers(32), out=np.uint32)[0] == 0xA5A5A5A5
