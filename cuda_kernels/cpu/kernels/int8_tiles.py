"""Tiles of the int8 product: 8 tokens by 32 weight rows, whose sums stay in registers.

The codes of 32 rows are packed, so that each four adjacent columns of all rows are two vectors. A token's four codes
are repeated in all lanes. So each lane sums up the products of one row, nothing is left to add up across lanes, and a
block's scale costs one multiplication and addition for 16 outputs. Packing costs as much as the products of 6 tokens.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.int8_vectors import CODES, N_SUMS, SUMS, load_offset_codes, multiply_add
from cuda_kernels.cpu.kernels.sizes import N_CODES, N_TILE_TOKENS
from cuda_kernels.cpu.kernels.vector_types import VectorType, addresses, load, pick, repeat, store

_ROW_BYTES = 8 * N_SUMS

_floats = VectorType("float32x16", ir.FloatType(), N_SUMS)
_tile = types.UniTuple(SUMS, 2 * N_TILE_TOKENS)


@intrinsic
def pack_codes(_context: Any, first: Any, stride: Any, n: Any, packed: Any) -> Any:
    """Store 64 columns of 16 rows, each code plus 128, so that each four adjacent columns of all rows are a vector.

    Args:
        first, stride, n: address of the first row's codes, bytes between rows, and how many rows follow the first.
            The last one stands for those after it.
        packed: address of the first vector. The others follow it, each 128 bytes further.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        rows = [load_offset_codes(builder, address) for address in addresses(builder, args[:3], N_SUMS)]
        rows, half = [builder.bitcast(row, SUMS.llvm) for row in rows], N_SUMS // 2
        for _ in range(4):  # Interleaved four times, 16 rows of 16 lanes are their columns.
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [_interleave(builder, a, b, range(lane, lane + half)) for a, b in pairs for lane in (0, half)]
        for i, row in enumerate(rows):
            store(builder, row, args[3], i * _ROW_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _interleave(builder: Any, a: Any, b: Any, lanes: range) -> Any:
    return pick(builder, a, b, [lane + side for lane in lanes for side in (0, N_SUMS)])


@intrinsic
def start_tile(_context: Any, offsets: Any) -> Any:
    """Return the sums of a tile, each less its token's offset.

    Args:
        offsets: address of 8 int32.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        found = [builder.neg(load(builder, ir.IntType(32), args[0], 4 * i)) for i in range(N_TILE_TOKENS)]
        return context.make_tuple(builder, _tile, [repeat(builder, each, N_SUMS) for each in found for _ in (0, 1)])

    return _tile(types.intp), codegen


@intrinsic
def add_to_tile(_context: Any, tile: Any, first: Any, stride: Any, n: Any, packed: Any) -> Any:
    """Add the products of four adjacent columns.

    Args:
        first, stride, n: address of the first token's codes, bytes between tokens, and how many tokens follow the
            first. The last one stands for those after it.
        packed: address of the two vectors of these columns.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        rows = [load(builder, CODES.llvm, args[4], offset) for offset in (0, N_CODES)]
        found, added = iter(cgutils.unpack_tuple(builder, args[0])), []
        for address in addresses(builder, args[1:4], N_TILE_TOKENS):
            four = repeat(builder, load(builder, ir.IntType(32), address), N_SUMS)
            codes = builder.bitcast(four, CODES.llvm)
            added += [multiply_add(builder, next(found), row, codes) for row in rows]
        return context.make_tuple(builder, _tile, added)

    return _tile(_tile, *[types.intp] * 4), codegen


@intrinsic
def add_scaled_tile(_context: Any, tile: Any, scales: Any, sums: Any) -> Any:
    """Add a tile's sums, times their token's scale, to those in memory, each step rounded to float32.

    Args:
        scales: address of 8 float32.
        sums: address of float32 [8, 32].
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for i, products in enumerate(cgutils.unpack_tuple(builder, args[0])):
            scale = repeat(builder, load(builder, ir.FloatType(), args[1], i // 2 * 4), N_SUMS)
            scaled = builder.fmul(builder.sitofp(products, _floats.llvm), scale)
            before = load(builder, _floats.llvm, args[2], i * 4 * N_SUMS)
            store(builder, builder.fadd(before, scaled), args[2], i * 4 * N_SUMS)
        return context.get_dummy_value()

    return types.void(_tile, types.intp, types.intp), codegen
