"""Races: two threads, one place in memory, nothing that orders them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tools.ptx import PtxError, Trace
from tests.tools.ptx.snippets import run

STATIC = ".shared .align 16 .b8 tile[1024];\n"


def shared(body: str, block: int = 32, head: str = STATIC, **options: Any) -> Trace:
    return run(
        f"mov.u64 %rd4, tile; mad.wide.u32 %rd5, %index, 4, %rd4; {body} ret;", block=block, head=head, **options
    )


NEIGHBOUR = "xor.b32 %r1, %index, {distance}; mad.wide.u32 %rd6, %r1, 4, %rd4;"


@pytest.mark.parametrize("distance", [1, 32])
def test_read_of_another_threads_write_needs_a_barrier(distance: int) -> None:
    read = NEIGHBOUR.format(distance=distance) + " ld.shared.u32 %r0, [%rd6];"
    with pytest.raises(PtxError, match="races with a write"):
        shared(f"st.shared.u32 [%rd5], %index; {read}", block=64)
    shared(f"st.shared.u32 [%rd5], %index; bar.sync 0; {read}", block=64)


def test_barrier_of_a_warp_orders_its_own_threads_alone() -> None:
    body = "st.shared.u32 [%rd5], %index; bar.warp.sync 0xffffffff; {} ld.shared.u32 %r0, [%rd6];"
    shared(body.format(NEIGHBOUR.format(distance=1)), block=64)
    with pytest.raises(PtxError, match="races with a write"):
        shared(body.format(NEIGHBOUR.format(distance=32)), block=64)


def test_write_over_what_another_thread_reads_needs_a_barrier() -> None:
    read = "st.shared.u32 [%rd5], 7; bar.sync 0;" + NEIGHBOUR + " ld.shared.u32 %r0, [%rd6];"
    write = "st.shared.u32 [%rd5], %index;"
    for distance in (1, 32):
        with pytest.raises(PtxError, match="races with another thread"):
            shared(read.format(distance=distance) + write, block=64)
        shared(read.format(distance=distance) + "bar.sync 0;" + write, block=64)


def test_read_by_several_threads_is_not_forgotten() -> None:
    """All read one word, then one of them overwrites it: the last reader noted must not hide the others."""
    body = "setp.eq.u32 %p0, %index, {}; @%p0 st.shared.u32 [%rd4], 3; bar.sync 0; ld.shared.u32 %r0, [%rd4]; {}"
    for writer in (0, 5, 31, 32, 63):
        with pytest.raises(PtxError, match="races with another thread"):
            shared(body.format(writer, "@%p0 st.shared.u32 [%rd4], 4;"), block=64)
        shared(body.format(writer, "bar.sync 0; @%p0 st.shared.u32 [%rd4], 4;"), block=64)


def test_read_by_another_warp_is_not_hidden_by_the_own_warp_s() -> None:
    """All read one word; a barrier of the second warp orders its own reads before its write, not the first warp's."""
    body = """setp.eq.u32 %p0, %index, 40; @%p0 st.shared.u32 [%rd4], 3; bar.sync 0; {}
        ld.shared.u32 %r0, [%rd4]; DONE: bar.warp.sync 0xffffffff; @%p0 st.shared.u32 [%rd4], 4;"""
    with pytest.raises(PtxError, match="races with another thread"):
        shared(body.format(""), block=64)
    shared(body.format("setp.lt.u32 %p1, %index, 32; @%p1 bra DONE;"), block=64)


def test_two_writers_race_unless_they_agree() -> None:
    to_one = (
        "mov.u32 %r0, {}; setp.lt.u32 %p0, %index, 32; @%p0 st.shared.u32 [%rd4], 1; @!%p0 st.shared.u32 [%rd4], %r0;"
    )
    shared(to_one.format(1), block=64)
    with pytest.raises(PtxError, match="races with another thread"):
        shared(to_one.format(2), block=64)
    with pytest.raises(PtxError, match="different values in one instruction"):
        shared("st.shared.u32 [%rd4], %index;")


def test_atomics_race_with_plain_accesses_only() -> None:
    start = "setp.eq.u32 %p0, %index, 0; @%p0 st.shared.u32 [%rd4], 0; bar.sync 0; red.shared.add.u32 [%rd4], %index;"
    shared(start + "red.shared.add.u32 [%rd4], 1; bar.sync 0; ld.shared.u32 %r0, [%rd4];", block=64)
    with pytest.raises(PtxError, match="races with a write"):
        shared(start + "ld.shared.u32 %r0, [%rd4];", block=64)


def test_bytes_of_one_word_are_told_apart() -> None:
    body = "cvt.u64.u32 %rd6, %index; add.u64 %rd6, %rd4, %rd6; st.shared.u8 [%rd6], %index;"
    shared(body + "ld.shared.u8 %r0, [%rd6];", block=64)
    with pytest.raises(PtxError, match="races with a write"):
        shared(
            body
            + "and.b32 %r1, %index, 60; cvt.u64.u32 %rd7, %r1; add.u64 %rd7, %rd7, %rd4; ld.shared.u32 %r0, [%rd7];"
        )


def test_blocks_have_shared_memory_of_their_own() -> None:
    out = np.zeros(8 * 32, np.uint32)
    body = """mov.u32 %r0, %ctaid.x; st.shared.u32 [%rd5], %r0; bar.sync 0; ld.shared.u32 %r1, [%rd5];
        mad.lo.u32 %r2, %r0, 32, %index; mad.wide.u32 %rd6, %r2, 4, %rd0; st.global.u32 [%rd6], %r1;"""
    run(f"mov.u64 %rd4, tile; mad.wide.u32 %rd5, %index, 4, %rd4; {body} ret;", out, grid=8, head=STATIC)
    np.testing.assert_array_equal(out, np.repeat(np.arange(8), 32))


@pytest.mark.parametrize("blocks_at_once", [1, 2, 16])
def test_blocks_that_store_different_values_to_one_address_are_reported(blocks_at_once: int) -> None:
    body = "mov.u32 %r0, %ctaid.x; {} mad.wide.u32 %rd4, %index, 4, %rd0; st.global.u32 [%rd4], %r0; ret;"
    out = np.zeros(32, np.uint32)
    with pytest.raises(PtxError, match=r"another value|different values"):
        run(body.format(""), out, grid=4, blocks_at_once=blocks_at_once)
    run(body.format("mov.u32 %r0, 5;"), out, grid=4, blocks_at_once=blocks_at_once)


def test_blocks_may_store_bytes_side_by_side() -> None:
    out = np.zeros(64, np.uint8)
    run(
        """mov.u32 %r0, %ctaid.x; mad.lo.u32 %r1, %index, 4, %r0; cvt.u64.u32 %rd4, %r1; add.u64 %rd4, %rd4, %rd0;
        st.global.u8 [%rd4], %r1; ret;""",
        out, block=16, grid=4,
    )  # fmt: skip
    np.testing.assert_array_equal(out, np.arange(64))


def test_word_over_another_blocks_byte_is_reported() -> None:
    out = np.zeros(64, np.uint8)
    body = """mov.u32 %r0, %ctaid.x; setp.eq.u32 %p0, %r0, 0;
        @%p0 st.global.u32 [%rd0+8], 0x01020304; @!%p0 st.global.u8 [%rd0+10], {}; ret;"""
    run(body.format(2), out, block=1, grid=2)
    with pytest.raises(PtxError, match="another value"):
        run(body.format(9), out, block=1, grid=2)
