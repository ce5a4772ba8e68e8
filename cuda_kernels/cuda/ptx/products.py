"""Instructions on tiles of int8 codes and their int32 products, unrolled here in Python; see `tiles`."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.cuda.ptx.code_generation import F32, I32, I64, call_ptx
from cuda_kernels.cuda.ptx.tiles import STEP_OF_ABSMAX, fma, make_tile, multiply, values_of

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


# Tensor cores.


def mma_tile(n_steps: int, is_turing: bool = False) -> Any:
    """Make (products, rows, tokens) -> products + those of 16 R rows with 8 T tokens over 64 columns a step, by a warp.

    Lane 4 g + q holds 16 codes from column 16 q on: of rows 16 r + g and 16 r + 8 + g (8 words for each r), and of
    tokens 8 t + g (4 words for each t). An mma expects other columns in a lane, but a sum does not depend on the order
    of its terms if both operands have the same one: one mma takes each lane's words 0 and 1, the next 2 and 3.

    products[r, t, c] is row 16 r + g + 8 (c // 2), token 8 t + 2 q + c % 2.

    Needs sm_80, or, if `is_turing`, sm_75, whose mma is a fourth as large: 8 rows by one word of each lane.
    """
    multiply_words = _mma_of_turing if is_turing else _mma

    @intrinsic
    def multiply(_context: Any, products: Any, rows: Any, tokens: Any) -> Any:
        n_rows, n_tokens = rows.count // n_steps // 8, tokens.count // n_steps // 4

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums, a, b = (values_of(builder, arg) for arg in args)
            for s, r, t, word in itertools.product(range(n_steps), range(n_rows), range(n_tokens), (0, 2)):
                upper, x, i = 8 * (s * n_rows + r) + word, 4 * (s * n_tokens + t) + word, 4 * (r * n_tokens + t)
                row_words = [a[upper], a[upper + 4], a[upper + 1], a[upper + 5]]
                sums[i : i + 4] = multiply_words(builder, row_words, [b[x], b[x + 1]], sums[i : i + 4])
            return make_tile(context, builder, signature, sums)

        return products(products, rows, tokens), codegen

    return multiply


def _mma(builder: Any, rows: list[Any], tokens: list[Any], sums: list[Any]) -> list[Any]:
    """IR for four sums of a lane: its rows g and g + 8 in their words 0, then in their words 1."""
    ptx = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    four = ir.LiteralStructType([I32] * 4)
    return values_of(builder, call_ptx(builder, ptx, "rrrr", four, "r" * 10, [*rows, *tokens, *sums]))


def _mma_of_turing(builder: Any, rows: list[Any], tokens: list[Any], sums: list[Any]) -> list[Any]:
    ptx = "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {$0,$1}, {$2}, {$3}, {$4,$5};"
    two, halves = ir.LiteralStructType([I32] * 2), [sums[:2], sums[2:]]
    for word, half in itertools.product((0, 1), (0, 1)):
        operands = [rows[2 * word + half], tokens[word], *halves[half]]
        halves[half] = values_of(builder, call_ptx(builder, ptx, "rr", two, "r" * 4, operands))
    return [*halves[0], *halves[1]]


def scale_mma_tile(n_token_tiles: int) -> Any:
    """Make (sums, products, x_absmax, token, n_tokens, n_blocks, b) -> sums + the products of `mma_tile`, scaled.

    Sums are float32. The scale of block b of a token is fl(x_absmax[token, b] * fl(1 / 127)). `token` is the lane's
    token 2 q; past the last token, its scale is repeated.
    """

    @intrinsic
    def scale(
        _context: Any, sums: Any, products: Any, absmax: Any, token: Any, n_tokens: Any, n_blocks: Any, b: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            sums, products = values_of(builder, args[0]), values_of(builder, args[1])
            absmax, first, n_tokens, n_blocks, b = args[2:]
            last, scales = builder.sub(n_tokens, I64(1)), {}
            for t, c in itertools.product(range(n_token_tiles), (0, 1)):
                at = builder.add(first, I64(8 * t + c))
                at = builder.select(builder.icmp_unsigned("<", at, last), at, last)
                place = builder.gep(absmax, [builder.add(builder.mul(at, n_blocks), b)])
                scales[t, c] = multiply(builder, builder.load(place), ir.Constant(F32, STEP_OF_ABSMAX))
            for i, product in enumerate(products):
                x_scale = scales[i // 4 % n_token_tiles, i % 2]
                sums[i] = fma(builder, builder.sitofp(product, F32), x_scale, sums[i])
            return make_tile(context, builder, signature, sums)

        return sums(sums, products, absmax, *[types.int64] * 4), codegen

    return scale


def add_mma_tile(n_token_tiles: int, stride: int) -> Any:
    """Adds what `mma_tile` returns to a shared int32 [tokens, stride], as several warps do: integers come out the same
    in any order. `first` is the index of the element whose row is g and whose token is 2 q."""

    @intrinsic
    def add(_context: Any, array: Any, first: Any, products: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            base = builder.gep(data, [args[1]])
            for i, value in enumerate(values_of(builder, args[2])):
                at = builder.gep(base, [I64(_place(i, n_token_tiles, stride))])
                builder.atomic_rmw("add", at, value, "monotonic")
            return context.get_dummy_value()

        return types.void(array, types.int64, products), codegen

    return add


def add_mma_floats(n_token_tiles: int, stride: int) -> Any:
    """Adds what `scale_mma_tile` returns to a shared float32 [tokens, stride], each place by one lane at a time.

    `first` as for `add_mma_tile`.
    """

    @intrinsic
    def add(_context: Any, array: Any, first: Any, sums: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            base = builder.gep(data, [args[1]])
            for i, value in enumerate(values_of(builder, args[2])):
                at = builder.gep(base, [I64(_place(i, n_token_tiles, stride))])
                total = call_ptx(builder, "add.rn.f32 $0, $1, $2;", "f", F32, "ff", [builder.load(at), value])
                builder.store(total, at)
            return context.get_dummy_value()

        return types.void(array, types.int64, sums), codegen

    return add


def _place(i: int, n_token_tiles: int, stride: int) -> int:
    """The place of a lane's product number i in a shared [tokens, stride], relative to its first."""
    (r, t), c = divmod(i // 4, n_token_tiles), i % 4
    return (8 * t + c % 2) * stride + 16 * r + 8 * (c // 2)
