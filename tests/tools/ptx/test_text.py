"""From text to program: names, calls, arguments, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.ptx import Memory, execute
from tests.tools.ptx.contraction import contractions
from tests.tools.ptx.parser import PtxSyntaxError, parse
from tests.tools.ptx.program import load
from tests.tools.ptx.snippets import HEADER, REGISTERS, evaluate, kernel
from tests.tools.ptx.toolchain import assemble, require_valid

LANES = np.arange(64, dtype=np.uint32)


def test_names_of_inner_scopes_are_their_own() -> None:
    """Inline assembly declares the same names again and again."""
    scope = """{ .reg .pred q; .reg .b32 t; setp.lt.u32 q, %r4, 8; mov.u32 t, 1;
        @!q bra SKIP; add.u32 t, t, 1; SKIP: add.u32 %r4, %r4, t; }"""
    found = evaluate(f"mov.u32 %r4, %a; {scope} {scope} mov.u32 %out, %r4;", LANES, out=np.uint32)
    step = lambda x: x + (2 if x < 8 else 1)  # noqa: E731
    assert found.tolist() == [step(step(x)) for x in range(64)]


@pytest.mark.parametrize(
    "instruction",
    [
        "tanh.exotic.f32 %f0, %f0;", "ld.global.L3::maybe.u32 %r0, [%rd0];", "mul.u32 %r0, %r0, %r0;",
        "add.rna.f32 %f0, %f0, %f0;", "shfl.up.b32 %r0, %r0, 1, 0;", "bar.arrive 0, 64;", "vote.ballot.b32 %r0, %p0;",
        "mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%r0, %r1}, {%r0}, {%r0}, {%r0, %r1};",
        "cvt.s32.f32 %r0, %f0;", "cvt.f32.s32 %f0, %r0;", "fence.proxy.async;", "atom.global.mul.u32 %r0, [%rd0], %r0;",
        "cp.async.bulk.commit_group;", "min.u32 %r0, %r0, %r0, %r0;", "mov.u32 %r0, %clock;",
    ],
)  # fmt: skip
def test_instruction_that_is_not_known_is_refused_by_name(instruction: str) -> None:
    text = f"{HEADER}.visible .entry k() {{ {REGISTERS} {instruction} ret; }}"
    with pytest.raises(NotImplementedError, match=r"line \d+: "):
        execute(text, 1, 32, [], Memory())


@pytest.mark.parametrize(
    "instruction",
    ["add.u32 %r0, %r0, %h0;", "mov.u32 %r0, %unknown;", "setp.eq.u32 %r0, %r0, 1;", "add.u64 %rd0, %rd0, %r0;"],
)
def test_operand_of_the_wrong_type_is_refused(instruction: str) -> None:
    text = f"{HEADER}.visible .entry k() {{ {REGISTERS} {instruction} ret; }}"
    with pytest.raises((PtxSyntaxError, NotImplementedError), match=r"line \d+: "):
        execute(text, 1, 32, [], Memory())
    with pytest.raises(RuntimeError, match="ptxas"):
        require_valid(text, (9, 0))


CALL = """
.func (.param .b32 result) power(.param .b32 base, .param .b32 exponent)
{
    .reg .b32 %r<5>;
    .reg .pred %p<2>;
    ld.param.b32 %r1, [base];
    ld.param.b32 %r2, [exponent+0];
    mov.u32 %r3, 1;
LOOP:
    setp.eq.u32 %p1, %r2, 0;
    st.param.b32 [result+0], %r3;
    @%p1 ret;
    mul.lo.u32 %r3, %r3, %r1;
    sub.u32 %r2, %r2, 1;
    bra.uni LOOP;
}
"""


def call_of(base: str, exponent: str, target: str) -> str:
    return f"""{{ .param .b32 param0; st.param.b32 [param0+0], {base}; .param .b32 param1;
        st.param.b32 [param1+0], {exponent}; .param .b32 retval0;
        call.uni (retval0), power, (param0, param1); ld.param.b32 {target}, [retval0+0]; }}"""


def test_device_functions_are_called() -> None:
    body = "and.b32 %r4, %a, 3; " + call_of("%r4", "%a", "%r5") + call_of("3", "%r4", "%r6") + "add.u32 %out, %r5, %r6;"
    text = HEADER + CALL + kernel(body, [4], 4)
    require_valid(text, (9, 0))
    memory, values, out = Memory(), LANES % 11, np.zeros(64, np.uint32)
    execute(text, 1, 64, [memory.place(values), memory.place(out)], memory)
    assert out.tolist() == [int(x % 4) ** int(x) + 3 ** int(x % 4) for x in values]


def test_function_without_a_body_is_refused() -> None:
    text = (
        HEADER
        + ".extern .func (.param .b32 r) vprintf(.param .b64 a);\n"
        + kernel(
            "{ .param .b64 param0; .param .b32 retval0; call.uni (retval0), vprintf, (param0); } mov.u32 %out, 0;",
            [4],
            4,
        )
    )
    with pytest.raises(NotImplementedError, match="vprintf"):
        load(text)


def test_arguments_fill_the_parameters_in_order() -> None:
    text = f"""{HEADER}.visible .entry k(
        .param .u8 a, .param .u64 .ptr .align 4 out, .param .f32 f, .param .s16 s) {{ {REGISTERS}
        ld.param.u8 %r0, [a]; ld.param.u64 %rd0, [out]; ld.param.f32 %f0, [f]; ld.param.s16 %r1, [s];
        st.global.u32 [%rd0], %r0; st.global.f32 [%rd0+4], %f0; st.global.s32 [%rd0+8], %r1; ret; }}"""
    memory, out = Memory(), np.zeros(3, np.int32)
    address = memory.place(out)
    execute(text, 1, 1, [200, address, 1.5, -3], memory)
    assert (out[0], out[1:2].view(np.float32)[0], out[2]) == (200, 1.5, -3)
    for args in ([200, address, 1.5], [300, address, 1.5, -3], [200, address, 1, -3], [1.0, address, 1.5, -3]):
        with pytest.raises((ValueError, TypeError)):
            execute(text, 1, 1, args, memory)


def test_launch_beyond_the_bounds_is_refused() -> None:
    text = f"{HEADER}.visible .entry k()\n.maxntid 64, 1, 1\n{{ ret; }}"
    execute(text, 1, 64, [], Memory())
    with pytest.raises(ValueError, match="65 threads in a block, the kernel allows 64"):
        execute(text, 1, 65, [], Memory())


def test_name_chooses_among_kernels() -> None:
    text = HEADER + ".visible .entry one() { ret; }\n.visible .entry two() { exit; }"
    assert execute(text, 1, 1, [], Memory(), kernel="two").executed == {"exit": 1}
    with pytest.raises(ValueError, match="2 kernels"):
        execute(text, 1, 1, [], Memory())


def test_comments_go_and_lines_stay() -> None:
    text = f"{HEADER}.visible .entry k() {{ // a; b\n/* ret;\n */ exit;\n}}"
    instruction = parse(text).functions["k"].body[0]
    assert (instruction.opcode, instruction.line) == ("exit", HEADER.count("\n") + 3)


def test_text_that_is_no_ptx_is_refused() -> None:
    for text in ("int main() { return 0; }", HEADER + ".visible .entry k() { mov.u32 %r0, 1;", HEADER + "what"):
        with pytest.raises((PtxSyntaxError, ValueError)):
            parse(text)


def test_fusible_products_are_listed() -> None:
    fusible = kernel("mul.f32 %f0, %a, %b; add.f32 %out, %f0, %a;", [4, 4], 4)
    assert len(contractions(HEADER + fusible)) == 1
    for safe in (
        "mul.rn.f32 %f0, %a, %b; add.f32 %out, %f0, %a;",
        "mul.f32 %f0, %a, %b; add.rn.f32 %out, %f0, %a;",
        "mul.f32 %f0, %a, %b; add.f32 %out, %a, %a;",
    ):
        assert contractions(HEADER + kernel(safe, [4, 4], 4)) == []


@pytest.mark.parametrize("rounding", ["", ".rn"])
def test_ptxas_fuses_what_is_listed_and_nothing_else(rounding: str) -> None:
    body = f"mul{rounding}.f32 %f0, %a, %b; add{rounding}.f32 %out, %f0, %a;"
    opcodes = assemble(HEADER + kernel(body, [4, 4], 4), (9, 0)).opcodes()
    assert ("FFMA" in opcodes) == (rounding == "") == ("FMUL" not in opcodes)
