"""Vectors of 64 codes in registers, and their products summed into int32, which the loop vectorizer does not find.

x86 multiplies unsigned by signed bytes and adds four products to each int32 lane, 64 at a time (VPDPBUSD). So the
weight codes are offset by 128 to be unsigned, and the sum is corrected:

    sum_k (w[k] + 128) * x[k] = sum_k w[k] * x[k] + 128 * sum_k x[k]

The result is exact: the instruction wraps around at 2^32 as the correction does, and the corrected sum fits int32.
On processors without this instruction the sum is written with int16 pairs, for which every vector instruction set has
one (VPMADDWD on x86).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.vector_types import VectorType, load

N_LANES = 64
"""Codes of a vector."""

OFFSET = 128


_codes = VectorType("int8x64", ir.IntType(8), N_LANES)
_sums = VectorType("int32x16", ir.IntType(32), N_LANES // 4)


@intrinsic
def zero_sums(_context: Any) -> Any:
    def codegen(_cg: Any, _builder: Any, _signature: Any, _args: Any) -> Any:
        return ir.Constant(_sums.llvm, None)

    return _sums(), codegen


@intrinsic
def load_codes(_context: Any, address: Any, offset: Any) -> Any:
    """Load the 64 codes from `address + offset` on, at any alignment."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return load(builder, _codes, builder.add(*args))

    return _codes(types.intp, types.intp), codegen


@intrinsic
def load_offset_codes(_context: Any, address: Any, offset: Any) -> Any:
    """Load the 64 codes from `address + offset` on, each plus 128, as unsigned bytes."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        codes = load(builder, _codes, builder.add(*args))
        return builder.xor(codes, ir.Constant(_codes.llvm, [-OFFSET] * N_LANES))

    return _codes(types.intp, types.intp), codegen


@intrinsic
def add_products(_context: Any, sums: Any, offset_codes: Any, codes: Any) -> Any:
    """Add the 64 products of unsigned `offset_codes` and signed `codes` to the 16 sums, four to each."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        _triple, _processor, features = context.codegen().magic_tuple()
        if "+avx512vnni" in features:
            # The signature from before LLVM 21, which later ones still take.
            kind = ir.FunctionType(_sums.llvm, [_sums.llvm, _sums.llvm, _sums.llvm])
            dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
            return builder.call(
                dot, [args[0], builder.bitcast(args[1], _sums.llvm), builder.bitcast(args[2], _sums.llvm)]
            )
        return _add_pairs(builder, *args)

    return _sums(sums, offset_codes, codes), codegen


def _add_pairs(builder: Any, sums: Any, offset_codes: Any, codes: Any) -> Any:
    """Add the same products in the form that LLVM recognizes as products of int16 pairs."""
    wide = ir.VectorType(ir.IntType(32), N_LANES)
    products = builder.mul(builder.zext(offset_codes, wide), builder.sext(codes, wide))
    even, odd = (_pick(builder, products, range(first, N_LANES, 2)) for first in (0, 1))
    pairs = builder.add(even, odd)
    low, high = (_pick(builder, pairs, range(first, first + N_LANES // 4)) for first in (0, N_LANES // 4))
    return builder.add(builder.add(sums, low), high)


def _pick(builder: Any, vector: Any, lanes: range) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, vector, mask)


@intrinsic
def total(_context: Any, sums: Any) -> Any:
    """Add up the 16 sums: int32, wrapping."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [_sums.llvm])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        return builder.call(add, args)

    return types.int32(sums), codegen
