"""Floats as their stored bits, widened in registers: Numba has no bf16, and no fp16 on a CPU.

The integer type of the bits names the format, see `BITS_DTYPE`. With the sign cleared, the bits of IEEE floats are
ordered like their magnitudes, with infinity and then NaN at the top. So a maximum over bits is a maximum over
magnitudes that also shows non-finite values, at no cost.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_INT32 = ir.IntType(32)


@intrinsic
def widen(_context: Any, bits: Any) -> Any:
    """Widen the bits of an fp16 (uint16), bf16 (int16) or fp32 (uint32) value to float32, exactly."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        (value,) = args
        if bits == types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if bits == types.int16:
            value = builder.shl(builder.zext(value, _INT32), _INT32(16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits), codegen


@intrinsic
def narrow(_context: Any, value: Any, bits: Any) -> Any:
    """The bits of the nearest value to a float32 in the 16-bit format that the integer type of `bits` names.

    Ties to even; too large becomes infinite, NaN stays NaN.
    """

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        half = ir.IntType(16)
        if bits == types.uint16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), half)
        pattern = builder.bitcast(args[0], _INT32)
        high = builder.lshr(pattern, _INT32(16))
        odd = builder.and_(high, _INT32(1))
        nearest = builder.lshr(builder.add(builder.add(pattern, _INT32(0x7FFF)), odd), _INT32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, builder.or_(high, _INT32(0x40)), nearest), half)

    return bits(types.float32, bits), codegen


@intrinsic
def magnitude(_context: Any, bits: Any) -> Any:
    """The bits with the sign cleared, which are ordered like the magnitudes."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        width = bits.bitwidth
        return builder.and_(args[0], ir.Constant(ir.IntType(width), (1 << (width - 1)) - 1))

    return bits(bits), codegen
