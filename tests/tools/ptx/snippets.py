"""A few instructions as a whole kernel: inputs and output in arrays, one element per thread."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx import Memory, Trace, execute

Array = npt.NDArray[Any]

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>, %index;
    .reg .b64 %rd<16>, %at, %global;
    .reg .f32 %f<8>;
    .reg .f64 %d<8>;
"""
EXECUTED: list[str] = []
"""The texts that the tests of a module have run; at its end, ptxas must take them all (conftest.py)."""
HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"


def kernel(body: str, n_inputs: list[int], n_output: int, name: str = "snippet") -> str:
    """PTX of a kernel: inputs of these widths (in bytes) in %a, %b, %c, %d, the output of its width taken from %out."""
    lines = [f".visible .entry {name}(", ",\n".join(f"    .param .u64 p{i}" for i in range(len(n_inputs) + 1)), ") {"]
    lines += [REGISTERS, f"    .reg .b{8 * n_output} %out;"]
    lines += ["    mov.u32 %r0, %ctaid.x;", "    mov.u32 %r1, %ntid.x;", "    mov.u32 %index, %tid.x;"]
    lines += ["    mad.lo.u32 %r0, %r0, %r1, %index;"]
    for i, width in enumerate(n_inputs):
        lines += [f"    .reg .b{8 * width} %{'abcd'[i]};", *_address(i, width)]
        lines += [f"    ld.global.b{8 * width} %{'abcd'[i]}, [%at];"]
    lines += [body, *_address(len(n_inputs), n_output), f"    st.global.b{8 * n_output} [%at], %out;", "    ret;", "}"]
    return "\n".join(lines)


def _address(parameter: int, width: int) -> list[str]:
    return [
        f"    ld.param.u64 %at, [p{parameter}];",
        "    cvta.to.global.u64 %global, %at;",
        f"    mad.wide.u32 %at, %r0, {width}, %global;",
    ]


def evaluate(body: str, *inputs: Array, out: Any, block: int = 0, blocks: int = 1) -> Array:
    """What the instructions leave in %out, for every element of the inputs, as type `out`."""
    n = max((len(each) for each in inputs), default=block * blocks)
    memory, output = Memory(), np.full(n, 0x5A, np.uint8).repeat(np.dtype(out).itemsize).view(out)
    text = HEADER + kernel(body, [each.itemsize for each in inputs], output.itemsize)
    args = [memory.place(np.ascontiguousarray(each)) for each in (*inputs, output)]
    args[-1] = memory.place(output)
    EXECUTED.append(text)
    execute(text, blocks, block or n // blocks, args, memory)
    return output


def run(body: str, *arrays: Array, block: int = 32, grid: int = 1, head: str = "", **options: Any) -> Trace:
    """Run instructions with the arrays' addresses in %rd0, %rd1, ... and the thread's index in %index.

    `head` is module text before the kernel; `options` are those of `execute`.
    """
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(arrays)))
    start = f"{REGISTERS}\nmov.u32 %index, %tid.x;\n{loads}"
    text = f"{HEADER}{head}.visible .entry snippet({parameters}) {{\n{start}\n{body}\n}}"
    EXECUTED.append(text)
    memory = Memory()
    return execute(text, grid, block, [memory.place(each) for each in arrays], memory, **options)
