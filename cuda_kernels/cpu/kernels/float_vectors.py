"""Vectors of 32 float32 in registers, widened from integers and narrowed to fp16 and bf16.

The loop vectorizer leaves short loops of fixed length scalar if their arrays might overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.sizes import N_FLOATS
from cuda_kernels.cpu.kernels.vector_types import VectorType, load, pick, repeat, store

_INT32 = ir.IntType(32)
_BF16_QUIET = 0x40
_BYTES = 4 * N_FLOATS

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


def _scaling_and_adding(n_tokens: int) -> Any:
    """Make the function that works on so many tokens at once: a sum of one does not wait for that of another."""

    @intrinsic
    def scale_and_add(_context: Any, sums: Any, scale: Any, x: Any, w: Any, n: Any) -> Any:
        """Multiply each token's 32 sums in memory by a scale each, and add n products to them, one after the other.

        Args:
            sums: address of float32 [tokens, 32].
            scale: address of 32 float32.
            x: address of the first token's factors, float32, and bytes from one token to the next.
            w: address of float32 [n, 32].
            n: factors of a token.
        """

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            sums, scale, x, w, n = args
            first, stride = cgutils.unpack_tuple(builder, x)
            size = n.type
            tokens = [builder.add(first, builder.mul(stride, size(t))) for t in range(n_tokens)]
            factor = load(builder, _floats.llvm, scale)
            totals = []
            for t in range(n_tokens):
                start = builder.fmul(load(builder, _floats.llvm, sums, t * _BYTES), factor)
                totals.append(cgutils.alloca_once_value(builder, start))
            with cgutils.for_range(builder, n) as loop:
                row = load(builder, _floats.llvm, builder.add(w, builder.mul(loop.index, size(_BYTES))))
                for token, total in zip(tokens, totals, strict=True):
                    value = load(builder, ir.FloatType(), builder.add(token, builder.mul(loop.index, size(4))))
                    product = builder.fmul(repeat(builder, value, N_FLOATS), row)
                    builder.store(builder.fadd(builder.load(total), product), total)
            for t, total in enumerate(totals):
                store(builder, builder.load(total), sums, t * _BYTES)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, x, types.intp, types.intp), codegen

    return scale_and_add


N_TOGETHER = 4
scale_and_add_one, scale_and_add_four = _scaling_and_adding(1), _scaling_and_adding(N_TOGETHER)
