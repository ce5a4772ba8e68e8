"""Vectors of 32 float32 in registers, widened from integers and narrowed to fp16 and bf16.

The loop vectorizer leaves short loops of fixed length scalar if their arrays might overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.vector_types import VectorType, load, pick, repeat, store

N_FLOATS = 32
"""Values of a vector: two registers of 512 bits."""

_INT32 = ir.IntType(32)
_BF16_QUIET = 0x40

_floats = VectorType("float32x32", ir.FloatType(), N_FLOATS)
_integers = VectorType("int32x32", _INT32, N_FLOATS)


@intrinsic
def load_floats(_context: Any, address: Any) -> Any:
    """Load the 32 float32 at `address`."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return load(builder, _floats.llvm, args[0])

    return _floats(types.intp), codegen


@intrinsic
def load_widened(_context: Any, address: Any, bits: Any) -> Any:
    """Load 32 floats at `address`, widened to float32 from the format that the integer type of `bits` names."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if bits == types.uint16:
            return builder.fpext(load(builder, ir.VectorType(ir.HalfType(), N_FLOATS), args[0]), _floats.llvm)
        if bits == types.uint32:
            return load(builder, _floats.llvm, args[0])
        halves = load(builder, ir.VectorType(ir.IntType(16), N_FLOATS), args[0])
        sixteen = ir.Constant(_integers.llvm, [16] * N_FLOATS)
        return builder.bitcast(builder.shl(builder.zext(halves, _integers.llvm), sixteen), _floats.llvm)

    return _floats(types.intp, bits), codegen


@intrinsic
def total(_context: Any, values: Any) -> Any:
    """Return the sum of 32 values: halves are added to each other until one is left."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        (rest,), n = args, N_FLOATS
        while n > 1:
            n //= 2
            rest = builder.fadd(pick(builder, rest, rest, range(n)), pick(builder, rest, rest, range(n, 2 * n)))
        return builder.extract_element(rest, _INT32(0))

    return types.float32(_floats), codegen


@intrinsic
def load_integers(_context: Any, address: Any) -> Any:
    """Load the 32 int32 at `address`, each rounded to float32."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.sitofp(load(builder, _integers.llvm, args[0]), _floats.llvm)

    return _floats(types.intp), codegen


@intrinsic
def fill(_context: Any, value: Any) -> Any:
    """Repeat one float32 32 times."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return repeat(builder, args[0], N_FLOATS)

    return _floats(types.float32), codegen


@intrinsic
def multiply(_context: Any, a: Any, b: Any) -> Any:
    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return _floats(a, b), codegen


@intrinsic
def add(_context: Any, a: Any, b: Any) -> Any:
    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return _floats(a, b), codegen


@intrinsic
def store_floats(_context: Any, values: Any, address: Any) -> Any:
    """Store 32 float32 at `address`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        store(builder, *args)
        return context.get_dummy_value()

    return types.void(_floats, types.intp), codegen


@intrinsic
def store_narrow(_context: Any, values: Any, address: Any, bits: Any) -> Any:
    """Store 32 values at `address`, each the nearest in the format that the integer type of `bits` names.

    Ties to even; too large becomes infinite, NaN stays NaN.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        store(builder, _narrow(builder, args[0], bits), args[1])
        return context.get_dummy_value()

    return types.void(_floats, types.intp, bits), codegen


def _narrow(builder: Any, values: Any, bits: Any) -> Any:
    if bits == types.uint16:
        return builder.fptrunc(values, ir.VectorType(ir.HalfType(), N_FLOATS))
    if bits == types.uint32:
        return values
    # The processor's bf16 instruction would take subnormal inputs for zero.
    one, half, quiet, sixteen = (ir.Constant(_integers.llvm, [v] * N_FLOATS) for v in (1, 0x7FFF, _BF16_QUIET, 16))
    pattern = builder.bitcast(values, _integers.llvm)
    high = builder.lshr(pattern, sixteen)
    nearest = builder.lshr(builder.add(builder.add(pattern, half), builder.and_(high, one)), sixteen)
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.trunc(
        builder.select(is_nan, builder.or_(high, quiet), nearest), ir.VectorType(ir.IntType(16), N_FLOATS)
    )
