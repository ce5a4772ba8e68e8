"""Instructions on a thread's tile of outputs, 4 tokens by 4 features, unrolled here in Python.

A tile is a tuple in row order, tokens by features, which LLVM splits into registers. A local array indexed at run time
would go to memory, and functions inlined by Numba cost seconds to compile. Pointers, indices and formats are those of
`scalars`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.cuda.ptx.code_generation import F32, I32, I64, call_ptx, narrow, widen
from cuda_kernels.reference import N_STEPS

STEP_OF_ABSMAX = np.float32(1) / np.float32(N_STEPS)
"""fl(1 / 127), a factor in place of a division: within two roundings of it, and without its slow path."""


def values_of(builder: Any, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(len(tile.type))]


def make_tile(context: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
    return context.make_tuple(builder, signature.return_type, values)


@intrinsic
def load4(_context: Any, pointer: Any, index: Any) -> Any:
    """Load elements index ... index + 3 at once; the address is aligned to all four."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.gep(args[0], [args[1]])
        element = context.get_value_type(pointer.dtype)
        at = builder.bitcast(base, ir.PointerType(ir.VectorType(element, 4)))
        four = builder.load(at, align=4 * pointer.dtype.bitwidth // 8)
        return make_tile(context, builder, signature, [builder.extract_element(four, I32(i)) for i in range(4)])

    return types.UniTuple(pointer.dtype, 4)(pointer, types.int64), codegen


@intrinsic
def load4_clamped(_context: Any, pointer: Any, index: Any, last: Any) -> Any:
    """Load elements index ... index + 3 one by one; past `last`, element `last`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for i in range(4):
            at = builder.add(args[1], I64(i))
            at = builder.select(builder.icmp_unsigned("<", at, args[2]), at, args[2])
            values.append(builder.load(builder.gep(args[0], [at])))
        return make_tile(context, builder, signature, values)

    return types.UniTuple(pointer.dtype, 4)(pointer, types.int64, types.int64), codegen


@intrinsic
def load4_shared(_context: Any, array: Any, index: Any) -> Any:
    """Load elements index ... index + 3 of a shared array of 32-bit values; 4 divides the index."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        element = context.get_value_type(array.dtype)
        at = builder.bitcast(builder.gep(data, [args[1]]), ir.PointerType(ir.VectorType(element, 4)))
        four = builder.load(at, align=16)
        return make_tile(context, builder, signature, [builder.extract_element(four, I32(i)) for i in range(4)])

    return types.UniTuple(array.dtype, 4)(array, types.int64), codegen


def _store4(builder: Any, pointer: Any, index: Any, values: list[Any]) -> None:
    four = ir.Constant(ir.VectorType(values[0].type, 4), ir.Undefined)
    for i, value in enumerate(values):
        four = builder.insert_element(four, value, I32(i))
    at = builder.bitcast(builder.gep(pointer, [index]), ir.PointerType(four.type))
    builder.store(four, at, align=4 * values[0].type.width // 8)


def _store_each(builder: Any, pointer: Any, index: Any, end: Any, values: list[Any]) -> None:
    for i, value in enumerate(values):
        at = builder.add(index, I64(i))
        with builder.if_then(builder.icmp_unsigned("<", at, end)):
            builder.store(value, builder.gep(pointer, [at]))


@intrinsic
def store_tile(_context: Any, y: Any, token: Any, feature: Any, M: Any, N: Any, values: Any) -> Any:
    """Store the part of the tile within y, [M, N]: one store a token if 4 divides N and rows are thus aligned."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        y, token, feature, n_tokens, n_features = args[:5]
        is_whole = builder.icmp_unsigned("==", builder.and_(n_features, I64(3)), I64(0))
        values = values_of(builder, args[5])
        for t in range(4):
            row = builder.add(token, I64(t))
            index = builder.add(builder.mul(row, n_features), feature)
            end = builder.mul(builder.add(row, I64(1)), n_features)
            is_token = builder.icmp_unsigned("<", row, n_tokens)
            four = values[4 * t : 4 * t + 4]
            with builder.if_then(is_token), builder.if_else(is_whole) as (whole, partial):
                with whole:
                    _store4(builder, y, index, four)
                with partial:
                    _store_each(builder, y, index, end, four)
        return context.get_dummy_value()

    return types.void(y, *[types.int64] * 4, types.UniTuple(y.dtype, 16)), codegen


# Formats.


@intrinsic
def widen_tile(_context: Any, bits: Any) -> Any:
    """Widen the bits of fp16 (uint16), bf16 (int16) or fp32 (uint32) values to float32, exactly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [v if v.type == I32 else builder.zext(v, I32) for v in values_of(builder, args[0])]
        return make_tile(context, builder, signature, [widen(builder, bits.dtype, word) for word in words])

    return types.UniTuple(types.float32, bits.count)(bits), codegen


@intrinsic
def narrow_tile(_context: Any, pointer: Any, values: Any) -> Any:
    """Round each float32 to the format that `pointer` names, to nearest, ties to even; return the bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = [narrow(builder, pointer.dtype, value) for value in values_of(builder, args[1])]
        stored = ir.IntType(pointer.dtype.bitwidth)
        return make_tile(
            context, builder, signature, bits if stored == I32 else [builder.trunc(b, stored) for b in bits]
        )

    return types.UniTuple(pointer.dtype, values.count)(pointer, values), codegen


# Arithmetic. Products and sums are separate instructions, so that no compiler fuses them.


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_ptx(builder, "fma.rn.f32 $0, $1, $2, $3;", "f", F32, "fff", [a, b, c])


def multiply(builder: Any, a: Any, b: Any) -> Any:
    return call_ptx(builder, "mul.rn.f32 $0, $1, $2;", "f", F32, "ff", [a, b])


@intrinsic
def fma_tile(_context: Any, sums: Any, tokens: Any, features: Any) -> Any:
    """sums[t, f] + tokens[t] * features[f], with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, x, w = (values_of(builder, arg) for arg in args)
        sums = [fma(builder, x[i // len(w)], w[i % len(w)], value) for i, value in enumerate(sums)]
        return make_tile(context, builder, signature, sums)

    return sums(sums, tokens, features), codegen


@intrinsic
def scale_tile(_context: Any, products: Any, x_scales: Any, weight_scales: Any, extra: Any, bias: Any) -> Any:
    """add(fma(multiply(products[t, f], x_scales[t]), weight_scales[f], extra[t, f]), bias[f]), each rounded.

    The products are int32, or float32.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        products, x_scales, weight_scales, extra, bias = (values_of(builder, arg) for arg in args)
        values = []
        for i, product in enumerate(products):
            t, f = divmod(i, len(bias))
            product = product if product.type == F32 else builder.sitofp(product, F32)
            scaled = multiply(builder, product, x_scales[t])
            scaled = fma(builder, scaled, weight_scales[f], extra[i])
            values.append(call_ptx(builder, "add.rn.f32 $0, $1, $2;", "f", F32, "ff", [scaled, bias[f]]))
        return make_tile(context, builder, signature, values)

    return extra(products, x_scales, weight_scales, extra, bias), codegen


@intrinsic
def multiply_tile(_context: Any, values: Any, factor: Any) -> Any:
    """multiply(value, factor), of each, rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return make_tile(
            context, builder, signature, [multiply(builder, v, args[1]) for v in values_of(builder, args[0])]
        )

    return values(values, types.float32), codegen
