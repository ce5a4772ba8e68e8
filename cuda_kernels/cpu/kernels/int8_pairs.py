"""int8 products on processors without byte products: int16 pairs, for which every vector instruction set has one.

x86 multiplies 16 pairs of int16 and adds each two products to an int32 lane (VPMADDWD of AVX2). The tokens' codes are
widened once, a row's when they are loaded. The sums of 6 tokens and 2 rows take 12 of 16 registers. They are exact.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.sizes import N_FLOATS
from cuda_kernels.cpu.kernels.vector_types import addresses, load, pick, prefetch, store

N_PAIR_TOKENS, N_PAIR_ROWS = 6, 2
"""Tokens and rows of a tile."""

_N = 16
_LINE = 64
_AHEAD = 1024
"""Bytes by which the codes of a row are fetched into the cache before they are read."""

_CODES = ir.VectorType(ir.IntType(8), _N)
_WIDE = ir.VectorType(ir.IntType(16), _N)
_PRODUCTS = ir.VectorType(ir.IntType(32), _N)
_SUMS = ir.VectorType(ir.IntType(32), _N // 2)


def _adding(n_tokens: int, n_rows: int) -> Any:
    """Make the function that multiplies so many tokens and rows at once."""

    @intrinsic
    def add(_context: Any, x: Any, w: Any, n: Any, tail: Any, n_tail: Any, scales: Any, sums: Any) -> Any:
        """Add the products of each token and row, times the token's scale, to sums in memory, each step in float32.

        Args:
            x: address of the first token, int16, bytes from one token to the next, and tokens that follow the first.
                The last one stands for those after it.
            w: the same of rows, int8.
            n: columns, a multiple of 64.
            tail, n_tail: as `w` and `n`, of columns that follow in x.
            scales: address of the first token's, float32.
            sums: address of the first token's and row's, float32 [tokens, 32].
        """

        def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            x, w, n, tail, n_tail, scales, sums = args
            tokens = addresses(builder, cgutils.unpack_tuple(builder, x), n_tokens)
            totals = [cgutils.alloca_once_value(builder, ir.Constant(_SUMS, None)) for _ in range(n_tokens * n_rows)]
            rows = addresses(builder, cgutils.unpack_tuple(builder, w), n_rows)
            _add_columns(builder, tokens, rows, n, totals)
            rows = addresses(builder, cgutils.unpack_tuple(builder, tail), n_rows)
            tokens = [builder.add(token, builder.shl(n, n.type(1))) for token in tokens]
            _add_columns(builder, tokens, rows, n_tail, totals)
            kind = ir.FunctionType(ir.IntType(32), [_SUMS])
            reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v8i32")
            for i, total in enumerate(totals):
                t, r = divmod(i, n_rows)
                at = 4 * (t * N_FLOATS + r)
                products = builder.sitofp(builder.call(reduce, [builder.load(total)]), ir.FloatType())
                scaled = builder.fmul(products, load(builder, ir.FloatType(), scales, 4 * t))
                store(builder, builder.fadd(load(builder, ir.FloatType(), sums, at), scaled), sums, at)
            return context.get_dummy_value()

        return types.void(x, w, types.intp, tail, types.intp, types.intp, types.intp), codegen

    return add


def _add_columns(builder: Any, tokens: list[Any], rows: list[Any], n: Any, totals: list[Any]) -> None:
    """IR that adds the products of n columns to the totals, each of which is in memory that becomes a register."""
    size = n.type
    n_unrolled = _LINE // _N if len(tokens) == 1 else 1
    with cgutils.for_range_slice(builder, size(0), n, size(_N * n_unrolled)) as (k, _):
        if len(tokens) == 1:  # memory sets the pace
            prefetch(builder, builder.add(rows[0], k), _AHEAD)
        for i in range(n_unrolled):
            column = builder.add(k, size(i * _N))
            wide_rows = [builder.sext(load(builder, _CODES, builder.add(row, column)), _WIDE) for row in rows]
            found = iter(totals)
            for token in tokens:
                codes = load(builder, _WIDE, builder.add(token, builder.shl(column, size(1))))
                for row in wide_rows:
                    total = next(found)
                    builder.store(builder.add(builder.load(total), _pair_products(builder, codes, row)), total)


def _pair_products(builder: Any, a: Any, b: Any) -> Any:
    """IR of the sums of two adjacent products each, in the form that LLVM recognizes as one instruction."""
    products = builder.mul(builder.sext(a, _PRODUCTS), builder.sext(b, _PRODUCTS))
    return builder.add(*(pick(builder, products, products, range(i, _N, 2)) for i in (0, 1)))


add_tile = _adding(N_PAIR_TOKENS, N_PAIR_ROWS)
add_token_and_row = _adding(1, 1)
