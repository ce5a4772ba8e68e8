"""Instructions on tiles of values, unrolled here in Python: `intrinsics`' part for the int8 products.

A tile is a tuple, which LLVM takes apart into registers; a local array indexed at run time would go to memory, and what
is inlined in Numba costs seconds to compile. Pointers, indices and formats are those of `intrinsics`; a tile of R rows
and C columns is in row order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.intrinsics import _F32, _I32, _I64, _call, _narrow, _widen


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fma.rn.f32 $0, $1, $2, $3;", "f", _F32, "fff", [a, b, c])


def _multiply(builder: Any, a: Any, b: Any) -> Any:
    return _call(builder, "mul.rn.f32 $0, $1, $2;", "f", _F32, "ff", [a, b])


def _values(builder: Any, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, i) for i in range(len(tile.type))]


def _tile(context: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
    return context.make_tuple(builder, signature.return_type, values)


# Memory.


def _load_before(builder: Any, pointer: Any, index: Any, end: Any) -> Any:
    """IR for the element at an index, in 32 bits; 0 from index `end` on."""
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("<", index, end)):
        value = builder.load(builder.gep(pointer, [index]))
        value = value if value.type == _I32 else builder.zext(value, _I32)
        inside = builder.block
    either = builder.phi(_I32)
    either.add_incoming(_I32(0), before)
    either.add_incoming(value, inside)
    return either


@intrinsic
def gather16(_context: Any, codes: Any, index: Any, end: Any) -> Any:
    """16 codes of any alignment, one by one, as four words; zeros from index `end` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [_I32(0)] * 4
        for i in range(16):
            code = _load_before(builder, args[0], builder.add(args[1], _I64(i)), args[2])
            words[i // 4] = builder.or_(words[i // 4], builder.shl(code, _I32(8 * (i % 4))))
        return _tile(context, builder, signature, words)

    return types.UniTuple(types.uint32, 4)(codes, types.uint64, types.uint64), codegen


@intrinsic
def load4(_context: Any, pointer: Any, index: Any) -> Any:
    """Elements index ... index + 3 by one load; aligned to the four."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.gep(args[0], [args[1]])
        element = context.get_value_type(pointer.dtype)
        at = builder.bitcast(base, ir.PointerType(ir.VectorType(element, 4)))
        four = builder.load(at, align=4 * pointer.dtype.bitwidth // 8)
        return _tile(context, builder, signature, [builder.extract_element(four, _I32(i)) for i in range(4)])

    return types.UniTuple(pointer.dtype, 4)(pointer, types.uint64), codegen


@intrinsic
def load4_clamped(_context: Any, pointer: Any, index: Any, last: Any) -> Any:
    """Elements index ... index + 3 by four loads; element `last` for those beyond it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for i in range(4):
            at = builder.add(args[1], _I64(i))
            at = builder.select(builder.icmp_unsigned("<", at, args[2]), at, args[2])
            values.append(builder.load(builder.gep(args[0], [at])))
        return _tile(context, builder, signature, values)

    return types.UniTuple(pointer.dtype, 4)(pointer, types.uint64, types.uint64), codegen


@intrinsic
def load4_shared(_context: Any, array: Any, index: Any) -> Any:
    """Elements index ... index + 3 of a shared array of 32-bit values; 4 divides the index."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        element = context.get_value_type(array.dtype)
        at = builder.bitcast(builder.gep(data, [args[1]]), ir.PointerType(ir.VectorType(element, 4)))
        four = builder.load(at, align=16)
        return _tile(context, builder, signature, [builder.extract_element(four, _I32(i)) for i in range(4)])

    return types.UniTuple(array.dtype, 4)(array, types.uint64), codegen


@intrinsic
def store4(_context: Any, pointer: Any, index: Any, values: Any) -> Any:
    """Elements index ... index + 3 by one store; aligned to the four."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        values = _values(builder, args[2])
        four = ir.Constant(ir.VectorType(values[0].type, 4), ir.Undefined)
        for i, value in enumerate(values):
            four = builder.insert_element(four, value, _I32(i))
        at = builder.bitcast(builder.gep(args[0], [args[1]]), ir.PointerType(four.type))
        builder.store(four, at, align=4 * pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.uint64, types.UniTuple(pointer.dtype, 4)), codegen


@intrinsic
def store4_before(_context: Any, pointer: Any, index: Any, end: Any, values: Any) -> Any:
    """Those of the elements index ... index + 3 that come before `end`, one by one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for i, value in enumerate(_values(builder, args[3])):
            at = builder.add(args[1], _I64(i))
            with builder.if_then(builder.icmp_unsigned("<", at, args[2])):
                builder.store(value, builder.gep(args[0], [at]))
        return context.get_dummy_value()

    return types.void(pointer, types.uint64, types.uint64, types.UniTuple(pointer.dtype, 4)), codegen


# Formats.


@intrinsic
def widen_tile(_context: Any, bits: Any) -> Any:
    """Bits of fp16 (uint16), bf16 (int16) or fp32 (uint32) values -> float32, exactly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = [v if v.type == _I32 else builder.zext(v, _I32) for v in _values(builder, args[0])]
        return _tile(context, builder, signature, [_widen(builder, bits.dtype, word) for word in words])

    return types.UniTuple(types.float32, bits.count)(bits), codegen


@intrinsic
def narrow_tile(_context: Any, pointer: Any, values: Any) -> Any:
    """Each float32 -> bits of the format that `pointer` names, to the nearest, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = [_narrow(builder, pointer.dtype, value) for value in _values(builder, args[1])]
        stored = ir.IntType(pointer.dtype.bitwidth)
        return _tile(context, builder, signature, bits if stored == _I32 else [builder.trunc(b, stored) for b in bits])

    return types.UniTuple(pointer.dtype, values.count)(pointer, values), codegen


# Arithmetic. Products and sums of floats are spelled out, so that no compiler fuses them otherwise.


@intrinsic
def keep(_context: Any, words: Any, condition: Any) -> Any:
    """The words, or zeros where the condition is false."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [builder.select(args[1], word, ir.Constant(word.type, 0)) for word in _values(builder, args[0])]
        return _tile(context, builder, signature, values)

    return words(words, types.boolean), codegen


@intrinsic
def dp4a_tile(_context: Any, products: Any, rows: Any, tokens: Any) -> Any:
    """products[t, r] + the dot product of token t's and row r's 16 int8 codes; 4 words a row, 4 a token."""
    n_rows = rows.count // 4

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, row_words, token_words = (_values(builder, arg) for arg in args)
        for i in range(len(sums)):
            t, r = divmod(i, n_rows)
            for word in range(4):
                operands = [row_words[4 * r + word], token_words[4 * t + word], sums[i]]
                sums[i] = _call(builder, "dp4a.s32.s32 $0, $1, $2, $3;", "r", _I32, "rrr", operands)
        return _tile(context, builder, signature, sums)

    return products(products, rows, tokens), codegen


@intrinsic
def warp_sums(_context: Any, values: Any) -> Any:
    """The sums over the warp's 32 lanes of 1, 2, 4 ... 32 int32: lane l gets the sum of value l * count // 32.

    At each step the lanes of a pair keep one half of the values each and hand over the other: count - 1 shuffles, then
    one a step, where summing value by value would take five each.
    """

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        sums = _values(builder, args[0])
        lane = _call(builder, "mov.u32 $0, %laneid;", "r", _I32, "", [])
        for distance in (16, 8, 4, 2, 1):
            sent = sums
            if len(sums) > 1:
                pairs = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
                is_upper = builder.icmp_unsigned("!=", builder.and_(lane, _I32(distance)), _I32(0))
                sums = [builder.select(is_upper, upper, lower) for lower, upper in pairs]
                sent = [builder.select(is_upper, lower, upper) for lower, upper in pairs]
            text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
            received = [_call(builder, text, "r", _I32, "r", [value], True) for value in sent]
            sums = [builder.add(*pair) for pair in zip(sums, received, strict=True)]
        return sums[0]

    return types.int32(values), codegen


@intrinsic
def fma_tile(_context: Any, sums: Any, tokens: Any, features: Any) -> Any:
    """sums[t, f] + tokens[t] * features[f], with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, x, w = (_values(builder, arg) for arg in args)
        sums = [_fma(builder, x[i // len(w)], w[i % len(w)], value) for i, value in enumerate(sums)]
        return _tile(context, builder, signature, sums)

    return sums(sums, tokens, features), codegen


@intrinsic
def scale_tile(_context: Any, products: Any, x_scales: Any, weight_scales: Any, extra: Any, bias: Any) -> Any:
    """add(fma(multiply(products[t, f], x_scales[t]), weight_scales[f], extra[t, f]), bias[f]), each rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        products, x_scales, weight_scales, extra, bias = (_values(builder, arg) for arg in args)
        values = []
        for i, product in enumerate(products):
            t, f = divmod(i, len(bias))
            scaled = _multiply(builder, builder.sitofp(product, _F32), x_scales[t])
            scaled = _fma(builder, scaled, weight_scales[f], extra[i])
            values.append(_call(builder, "add.rn.f32 $0, $1, $2;", "f", _F32, "ff", [scaled, bias[f]]))
        return _tile(context, builder, signature, values)

    return extra(products, x_scales, weight_scales, extra, bias), codegen


@intrinsic
def multiply_tile(_context: Any, values: Any, factor: Any) -> Any:
    """multiply(value, factor), of each, rounded."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _tile(context, builder, signature, [_multiply(builder, v, args[1]) for v in _values(builder, args[0])])

    return values(values, types.float32), codegen


# Tensor cores, sm_80 and newer.


@intrinsic
def mma_tile(_context: Any, products: Any, rows: Any, tokens: Any) -> Any:
    """A warp's products of 16 R rows with 8 T tokens over 64 columns, on the tensor cores.

    Lane 4 g + q holds 16 codes from column 16 q on: of rows 16 r + g and 16 r + 8 + g (8 words for each r), and of
    tokens 8 t + g (4 words for each t). An mma wants other columns in a lane, but a sum does not care about the order
    of its terms as long as both operands agree on it: one mma takes each lane's words 0 and 1, the next 2 and 3.

    products[r, t, c] is row 16 r + g + 8 (c // 2), token 8 t + 2 q + c % 2.
    """
    n_tokens = tokens.count // 4
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, a, b = (_values(builder, arg) for arg in args)
        four = ir.LiteralStructType([_I32] * 4)
        for i in range(0, len(sums), 4):
            r, t = divmod(i // 4, n_tokens)
            for word in (0, 2):
                upper, lower, x = 8 * r + word, 8 * r + 4 + word, 4 * t + word
                operands = [a[upper], a[lower], a[upper + 1], a[lower + 1], b[x], b[x + 1], *sums[i : i + 4]]
                result = _call(builder, text, "rrrr", four, "r" * 10, operands)
                sums[i : i + 4] = _values(builder, result)
        return _tile(context, builder, signature, sums)

    return products(products, rows, tokens), codegen


def add_mma_tile(n_token_tiles: int, stride: int) -> Any:
    """Adds what `mma_tile` returns to a shared int32 [tokens, stride], as several warps do: integers come out the same
    in any order. `first` is the index of the element whose row is g and whose token is 2 q."""

    @intrinsic
    def add(_context: Any, array: Any, first: Any, products: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            base = builder.gep(data, [args[1]])
            for i, value in enumerate(_values(builder, args[2])):
                (r, t), c = divmod(i // 4, n_token_tiles), i % 4
                at = builder.gep(base, [_I64((8 * t + c % 2) * stride + 16 * r + 8 * (c // 2))])
                builder.atomic_rmw("add", at, value, "monotonic")
            return context.get_dummy_value()

        return types.void(array, types.uint64, products), codegen

    return add
