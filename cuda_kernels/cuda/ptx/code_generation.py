"""Code generation for the intrinsics of this package: LLVM's types, inline PTX, widening and narrowing of formats.

T of a `CPointer(T)` names the format, as in `cpu.BITS_DTYPE`: uint16 is fp16, int16 is bf16, uint32 and float32 are
fp32. Importing this module needs numba-cuda, but no device.
"""

from __future__ import annotations

import inspect
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

I16, I32, I64, F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
IR_TYPE = {types.int32: I32, types.uint32: I32, types.uint64: I64, types.float32: F32}
CONSTRAINT = {types.int32: "r", types.uint32: "r", types.uint64: "l", types.float32: "f"}


def device_function(name: str, n_arguments: int, typed: Any) -> Any:
    """Apply `intrinsic` to a function made in a loop, with the name and number of arguments that Numba needs."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__name__ = typed.__qualname__ = name
    typed.__signature__ = inspect.Signature([inspect.Parameter(f"a{k}", kind) for k in range(n_arguments + 1)])
    return intrinsic(typed)


def call_ptx(
    builder: Any, ptx: str, results: str, result: Any, operands: str, args: Any, volatile: bool = False
) -> Any:
    """Emit one instruction; constraint letters are h, r, l for 16, 32, 64 bits, and f for float32."""
    constraints = ",".join([*("=" + letter for letter in results), *operands])
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(ir.InlineAsm(function, ptx, constraints, side_effect=volatile), args)


def instruction(name: str, ptx: str, result: Any, *operands: Any) -> Any:
    """Make the device function `name(*operands) -> result`, which is the one instruction `ptx`."""
    letters = "".join(CONSTRAINT[operand] for operand in operands)

    def typed(_context: Any, *_args: Any) -> Any:
        def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return call_ptx(builder, ptx, CONSTRAINT[result], IR_TYPE[result], letters, args)

        return result(*operands), codegen

    return device_function(name, len(operands), typed)


def widen(builder: Any, format: Any, bits: Any) -> Any:
    """IR for the value of 16 bits in the lower half of a uint32, whose upper half is ignored, or of 32 bits."""
    if format == types.uint16:
        return call_ptx(builder, "cvt.f32.f16 $0, $1;", "f", F32, "h", [builder.trunc(bits, I16)])
    if format == types.int16:
        bits = builder.shl(bits, ir.Constant(I32, 16))
    return builder.bitcast(bits, F32)


def narrow(builder: Any, format: Any, x: Any) -> Any:
    """IR for the nearest value in a format, ties to even, as bits in the lower part of a uint32."""
    if format == types.uint16:
        return builder.zext(call_ptx(builder, "cvt.rn.f16.f32 $0, $1;", "h", I16, "f", [x]), I32)
    bits = builder.bitcast(x, I32)
    if format == types.int16:  # in integers, because the instruction needs sm_80
        half = ir.Constant(I32, 16)
        even = builder.and_(builder.lshr(bits, half), ir.Constant(I32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), even), half)
        return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(I32, 0x7FC0), rounded)
    return bits
