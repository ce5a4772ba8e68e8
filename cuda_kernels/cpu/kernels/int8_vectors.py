"""Vectors of 64 codes in registers, and their products summed into int32, which the loop vectorizer does not find.

x86 multiplies unsigned by signed bytes and adds four adjacent products to each int32 lane, 64 at a time (VPDPBUSD). So
the weight codes are offset by 128 to be unsigned, and the sum is corrected:

    sum_k (w[k] + 128) * x[k] = sum_k w[k] * x[k] + 128 * sum_k x[k]

The result is exact: the instruction wraps around at 2^32 as the correction does, and the corrected sum fits int32.
`int8_pairs` is for processors without this instruction.

The functions take one token or more and four rows at a time: tuples of the addresses of their codes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.sizes import N_CODES, N_FLOATS
from cuda_kernels.cpu.kernels.vector_types import VectorType, load, pick, prefetch, repeat, store

HAS_BYTE_PRODUCTS = "+avx512vnni" in cpu_target.target_context.codegen().magic_tuple()[2]
"""Whether the processor that is compiled for has VPDPBUSD on 64 bytes."""

OFFSET = 128

_N_CHAINS = 4
"""Sums of one row that do not wait for each other."""

_AHEAD = 256
"""Bytes by which a row's codes are fetched into the cache before they are read."""

N_SUMS = N_CODES // 4
"""int32 sums of a vector of codes."""

SUM_BYTES = 4 * N_SUMS

_N_VECTOR_ROWS = 4

CODES = VectorType("int8x64", ir.IntType(8), N_CODES)
SUMS = VectorType("int32x16", ir.IntType(32), N_SUMS)
_row_sums = VectorType("float32x4", ir.FloatType(), _N_VECTOR_ROWS)


@intrinsic
def zero_sums(_context: Any, xs: Any) -> Any:
    """Return 16 sums of 0 for each token and row."""
    kind = types.UniTuple(SUMS, xs.count * _N_VECTOR_ROWS)

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(SUMS.llvm, None)] * kind.count)

    return kind(xs), codegen


@intrinsic
def add_products(_context: Any, sums: Any, xs: Any, ws: Any, k: Any) -> Any:
    """Add the 64 products from column `k` on, each weight code plus 128, to the 16 sums of each token and row."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        tokens, rows = cgutils.unpack_tuple(builder, args[1]), cgutils.unpack_tuple(builder, args[2])
        row_codes = [load_offset_codes(builder, builder.add(row, args[3])) for row in rows]
        found, added = iter(cgutils.unpack_tuple(builder, args[0])), []
        for token in tokens:
            codes = load(builder, CODES.llvm, builder.add(token, args[3]))
            added += [multiply_add(builder, next(found), row, codes) for row in row_codes]
        return context.make_tuple(builder, sums, added)

    return sums(sums, xs, ws, types.intp), codegen


@intrinsic
def row_products(_context: Any, x: Any, w: Any, n: Any) -> Any:
    """Return the 16 sums of the products of one token and one row, each weight code plus 128.

    Args:
        x, w: addresses of the codes.
        n: columns, a multiple of 64.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        x_at, w_at, n_columns = args
        totals = [cgutils.alloca_once_value(builder, ir.Constant(SUMS.llvm, None)) for _ in range(_N_CHAINS)]

        def add(k: Any, total: Any) -> None:
            codes, row = (
                load(builder, CODES.llvm, builder.add(x_at, k)),
                load_offset_codes(builder, builder.add(w_at, k)),
            )
            builder.store(multiply_add(builder, builder.load(total), row, codes), total)

        size = n_columns.type
        step = size(N_CODES * _N_CHAINS)
        n_stepped = builder.mul(builder.sdiv(n_columns, step), step)
        with cgutils.for_range_slice(builder, size(0), n_stepped, step) as (k, _):
            for i, total in enumerate(totals):
                prefetch(builder, builder.add(w_at, k), _AHEAD + i * N_CODES)
                add(builder.add(k, size(i * N_CODES)), total)
        with cgutils.for_range_slice(builder, n_stepped, n_columns, size(N_CODES)) as (k, _):
            prefetch(builder, builder.add(w_at, k), _AHEAD)
            add(k, totals[0])
        first, *others = (builder.load(total) for total in totals)
        for other in others:
            first = builder.add(first, other)
        return first

    return SUMS(types.intp, types.intp, types.intp), codegen


@intrinsic
def store_sums(_context: Any, sums: Any, address: Any) -> Any:
    """Store 16 sums at `address`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        store(builder, *args)
        return context.get_dummy_value()

    return types.void(SUMS, types.intp), codegen


@intrinsic
def load_sums(_context: Any, address: Any) -> Any:
    """Load the 16 sums of each of four rows, one after the other from `address` on."""
    kind = types.UniTuple(SUMS, _N_VECTOR_ROWS)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums = [load(builder, SUMS.llvm, args[0], row * SUM_BYTES) for row in range(_N_VECTOR_ROWS)]
        return context.make_tuple(builder, kind, sums)

    return kind(types.intp), codegen


@intrinsic
def zero_floats(_context: Any, xs: Any) -> Any:
    """Return four float32 of 0, one for each row, for each token."""
    kind = types.UniTuple(_row_sums, xs.count)

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(_row_sums.llvm, None)] * kind.count)

    return kind(xs), codegen


@intrinsic
def add_scaled_totals(_context: Any, row_sums: Any, sums: Any, offsets: Any, scales: Any) -> Any:
    """Add the totals of each token's sums, less its offset and times its scale, each step rounded to float32.

    Args:
        offsets, scales: addresses of the first token's, int32 and float32.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        found, added = cgutils.unpack_tuple(builder, args[1]), []
        for t, before in enumerate(cgutils.unpack_tuple(builder, args[0])):
            totals = _four_totals(builder, found[t * _N_VECTOR_ROWS : (t + 1) * _N_VECTOR_ROWS])
            offset, scale = load(builder, ir.IntType(32), args[2], 4 * t), load(builder, ir.FloatType(), args[3], 4 * t)
            products = builder.sub(totals, repeat(builder, offset, _N_VECTOR_ROWS))
            scaled = builder.fmul(builder.sitofp(products, _row_sums.llvm), repeat(builder, scale, _N_VECTOR_ROWS))
            added.append(builder.fadd(before, scaled))
        return context.make_tuple(builder, row_sums, added)

    return row_sums(row_sums, sums, types.intp, types.intp), codegen


def _four_totals(builder: Any, vectors: list[Any]) -> Any:
    """IR of the totals of four vectors of int32, wrapping."""
    for n in (N_SUMS // 2, N_SUMS // 4):
        halves = [(pick(builder, v, v, range(n)), pick(builder, v, v, range(n, 2 * n))) for v in vectors]
        vectors = [builder.add(*pair) for pair in halves]
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.add(*(pick(builder, *pair, range(i, 8, 2)) for i in (0, 1))) for pair in pairs]
    return vectors[0]


@intrinsic
def store_row_sums(_context: Any, row_sums: Any, address: Any) -> Any:
    """Store each token's four sums in float32 [tokens, 32] at `address`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for t, values in enumerate(cgutils.unpack_tuple(builder, args[0])):
            store(builder, values, args[1], t * 4 * N_FLOATS)
        return context.get_dummy_value()

    return types.void(row_sums, types.intp), codegen


def load_offset_codes(builder: Any, address: Any) -> Any:
    """IR that loads 64 codes, each plus 128, as unsigned bytes."""
    return builder.xor(load(builder, CODES.llvm, address), ir.Constant(CODES.llvm, [-OFFSET] * N_CODES))


def multiply_add(builder: Any, sums: Any, offset_codes: Any, codes: Any) -> Any:
    """IR that adds the 64 products of unsigned `offset_codes` and signed `codes` to 16 sums, four to each."""
    # The signature from before LLVM 21, which later ones still take.
    kind = ir.FunctionType(SUMS.llvm, [SUMS.llvm] * 3)
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(dot, [sums, builder.bitcast(offset_codes, SUMS.llvm), builder.bitcast(codes, SUMS.llvm)])
