"""Instructions on tiles of int8 codes and their int32 products, unrolled here in Python; see `tiles`."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.cuda.ptx.code_generation import I32, I64, call_ptx
from cuda_kernels.cuda.ptx.tiles import make_tile, values_of

VECTOR = 16
"""Codes that a lane reads at a time."""


class Turn(NamedTuple):
    """The codes that a lane reads before it multiplies: 16 of each of `in_flight` steps, `step` columns apart.

    is_aligned: rows are whole aligned vectors. If not, each code is loaded alone.
    """

    in_flight: int
    step: int
    is_aligned: bool


def load_before(builder: Any, pointer: Any, index: Any, end: Any) -> Any:
    """IR for the element at an index, in 32 bits; 0 from index `end` on."""
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("<", index, end)):
        value = builder.load(builder.gep(pointer, [index]))
        value = value if value.type == I32 else builder.zext(value, I32)
        inside = builder.block
    either = builder.phi(I32)
    either.add_incoming(I32(0), before)
    either.add_incoming(value, inside)
    return either


def _load_any(builder: Any, codes: Any, index: Any, end: Any) -> list[Any]:
    words = [I32(0)] * 4
    for i in range(VECTOR):
        code = load_before(builder, codes, builder.add(index, I64(i)), end)
        words[i // 4] = builder.or_(words[i // 4], builder.shl(code, I32(8 * (i % 4))))
    return words


def _load_aligned(builder: Any, codes: Any, index: Any, is_read_once: bool) -> list[Any]:
    at = builder.gep(codes, [index])
    if is_read_once:
        four, ptx = ir.LiteralStructType([I32] * 4), "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];"
        return values_of(builder, call_ptx(builder, ptx, "rrrr", four, "l", [builder.ptrtoint(at, I64)], True))
    vector = builder.load(builder.bitcast(at, ir.VectorType(I32, 4).as_pointer()), align=VECTOR)
    return [builder.extract_element(vector, I32(i)) for i in range(4)]


def _load_aligned_before(builder: Any, codes: Any, index: Any, end: Any, is_read_once: bool) -> list[Any]:
    is_inside = builder.icmp_unsigned("<", index, end)
    index = builder.select(is_inside, index, builder.sub(end, I64(VECTOR)))
    return [builder.select(is_inside, word, I32(0)) for word in _load_aligned(builder, codes, index, is_read_once)]


def load_rows(count: int, apart: int, turn: Turn, is_read_once: bool, is_inside: bool) -> Any:
    """Make (codes, row, k, n_rows, K) -> a turn from column k on of `count` rows that are `apart` rows apart.

    It is 4 words for 16 codes, by steps and then rows. Past column K it has zeros, unless `is_inside` promises that no
    column is past K; past the last row it repeats that row. Codes that are read once bypass the L1 cache.
    """
    n_steps, step, is_aligned = turn

    @intrinsic
    def load(_context: Any, codes: Any, row: Any, k: Any, n_rows: Any, K: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            codes, row, k, n_rows, n_columns = args
            last, words = builder.sub(n_rows, I64(1)), []
            for i in range(n_steps * count):
                at = builder.add(row, I64(i % count * apart))
                start = builder.mul(builder.select(builder.icmp_unsigned("<", at, last), at, last), n_columns)
                index = builder.add(builder.add(start, k), I64(i // count * step))
                end = builder.add(start, n_columns)
                if not is_aligned:
                    words += _load_any(builder, codes, index, end)
                elif is_inside:
                    words += _load_aligned(builder, codes, index, is_read_once)
                else:
                    words += _load_aligned_before(builder, codes, index, end, is_read_once)
            return make_tile(context, builder, signature, words)

        return types.UniTuple(types.uint32, 4 * n_steps * count)(codes, *[types.int64] * 4), codegen

    return load


def dp4a_tile(n_steps: int) -> Any:
    """Make (products, rows, tokens) -> products[t, r] + the dot products of token t's and row r's codes, 16 a step."""

    @intrinsic
    def multiply(_context: Any, products: Any, rows: Any, tokens: Any) -> Any:
        n_rows, n_tokens = rows.count // n_steps // 4, tokens.count // n_steps // 4

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums, row_words, token_words = (values_of(builder, arg) for arg in args)
            for s, t, r, word in itertools.product(range(n_steps), range(n_tokens), range(n_rows), range(4)):
                operands = [row_words[4 * (s * n_rows + r) + word], token_words[4 * (s * n_tokens + t) + word]]
                i = t * n_rows + r
                sums[i] = call_ptx(builder, "dp4a.s32.s32 $0, $1, $2, $3;", "r", I32, "rrr", [*operands, sums[i]])
            return make_tile(context, builder, signature, sums)

        return products(products, rows, tokens), codegen

    return multiply


@intrinsic
def warp_sums(_context: Any, values: Any) -> Any:
    """The sums over the warp's 32 lanes of 1, 2, 4 ... 32 int32: lane l gets the sum of value l * count // 32.

    At each step the two lanes of a pair keep one half of the values each and pass the other half on. That takes
    count - 1 shuffles, then one a step; summing each value alone would take five shuffles a value.
    """

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums = values_of(builder, args[0])
        lane = call_ptx(builder, "mov.u32 $0, %laneid;", "r", I32, "", [])
        for distance in (16, 8, 4, 2, 1):
            sent = sums
            if len(sums) > 1:
                pairs = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
                is_upper = builder.icmp_unsigned("!=", builder.and_(lane, I32(distance)), I32(0))
                sums = [builder.select(is_upper, upper, lower) for lower, upper in pairs]
                sent = [builder.select(is_upper, lower, upper) for lower, upper in pairs]
            text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
            received = [call_ptx(builder, text, "r", I32, "r", [value], True) for value in sent]
            sums = [builder.add(*pair) for pair in zip(sums, received, strict=True)]
        return sums[0]

    return types.int32(values), codegen


# Tensor cores, sm_80 and newer.


def mma_tile(n_steps: int) -> Any:
    """Make (products, rows, tokens) -> products + those of 16 R rows with 8 T tokens over 64 columns a step, by a warp.

    Lane 4 g + q holds 16 codes from column 16 q on: of rows 16 r + g and 16 r + 8 + g (8 words for each r), and of
    tokens 8 t + g (4 words for each t). An mma expects other columns in a lane, but a sum does not depend on the order
    of its terms if both operands have the same one: one mma takes each lane's words 0 and 1, the next 2 and 3.

    products[r, t, c] is row 16 r + g + 8 (c // 2), token 8 t + 2 q + c % 2.
    """
    ptx = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"

    @intrinsic
    def multiply(_context: Any, products: Any, rows: Any, tokens: Any) -> Any:
        n_rows, n_tokens = rows.count // n_steps // 8, tokens.count // n_steps // 4

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums, a, b = (values_of(builder, arg) for arg in args)
            four = ir.LiteralStructType([I32] * 4)
            for s, r, t, word in itertools.product(range(n_steps), range(n_rows), range(n_tokens), (0, 2)):
                upper, x, i = 8 * (s * n_rows + r) + word, 4 * (s * n_tokens + t) + word, 4 * (r * n_tokens + t)
                operands = [a[upper], a[upper + 4], a[upper + 1], a[upper + 5], b[x], b[x + 1], *sums[i : i + 4]]
                sums[i : i + 4] = values_of(builder, call_ptx(builder, ptx, "rrrr", four, "r" * 10, operands))
            return make_tile(context, builder, signature, sums)

        return products(products, rows, tokens), codegen

    return multiply


def add_mma_tile(n_token_tiles: int, stride: int) -> Any:
    """Adds what `mma_tile` returns to a shared int32 [tokens, stride], as several warps do: integers come out the same
    in any order. `first` is the index of the element whose row is g and whose token is 2 q."""

    @intrinsic
    def add(_context: Any, array: Any, first: Any, products: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            base = builder.gep(data, [args[1]])
            for i, value in enumerate(values_of(builder, args[2])):
                (r, t), c = divmod(i // 4, n_token_tiles), i % 4
                at = builder.gep(base, [I64((8 * t + c % 2) * stride + 16 * r + 8 * (c // 2))])
                builder.atomic_rmw("add", at, value, "monotonic")
            return context.get_dummy_value()

        return types.void(array, types.int64, products), codegen

    return add
