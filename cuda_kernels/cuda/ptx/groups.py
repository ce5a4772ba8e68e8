"""Instructions on groups of eight adjacent values, for quantizing activations.

A group is a tuple of eight float32, unrolled here in Python (see `tiles`). A byte has a bit for each of its values, the
lowest for the first. Pointers, indices and formats are those of `scalars`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.cuda.ptx.code_generation import F32, I32, I64, call_ptx, widen
from cuda_kernels.cuda.ptx.products import load_before
from cuda_kernels.cuda.ptx.tiles import make_tile, multiply, values_of

GROUP = 8
"""Values that a thread takes at a time: 16 bytes of a 16-bit format."""

_GROUP = types.UniTuple(types.float32, GROUP)
_MAGNITUDE = I32(0x7FFFFFFF)
_ROUNDER = ir.Constant(F32, 1.5 * 2**23)
"""Added to a float32 of magnitude up to 2^22 it leaves no room for a fraction: the sum is rounded to an integer, ties
to even, and has its lowest byte."""


def _load_aligned(builder: Any, pointer: Any, index: Any, width: int) -> list[Any]:
    base = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(I32, 4).as_pointer())
    loads = [builder.load(builder.gep(base, [I32(i)]), align=16) for i in range(width // 16)]
    words = [builder.extract_element(four, I32(i)) for four in loads for i in range(4)]
    return words if width == 32 else [half for word in words for half in (word, builder.lshr(word, I32(16)))]


def load(is_aligned: bool) -> Any:
    """Make (x, start, g, K) -> group g of the row that starts at index `start`, 0 from column K on.

    It loads vectors of 16 bytes if rows are whole aligned groups, else single values.
    """

    @intrinsic
    def load_group(_context: Any, x: Any, start: Any, g: Any, K: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_pointer, start, g, n_columns = args
            index = builder.add(start, builder.mul(g, I64(GROUP)))
            if is_aligned:
                bits = _load_aligned(builder, x_pointer, index, x.dtype.bitwidth)
            else:
                end = builder.add(start, n_columns)
                bits = [load_before(builder, x_pointer, builder.add(index, I64(i)), end) for i in range(GROUP)]
            return make_tile(context, builder, signature, [widen(builder, x.dtype, each) for each in bits])

        return _GROUP(x, *[types.int64] * 3), codegen

    return load_group


@intrinsic
def byte_of(_context: Any, bits: Any, g: Any) -> Any:
    """Group g's byte of a shared array of words."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        word = builder.load(builder.gep(data, [builder.lshr(args[1], I64(2))]))
        shift = builder.mul(builder.trunc(builder.and_(args[1], I64(3)), I32), I32(8))
        return builder.and_(builder.lshr(word, shift), I32(0xFF))

    return types.uint32(bits, types.int64), codegen


def _magnitudes(builder: Any, group: Any) -> list[Any]:
    return [builder.and_(builder.bitcast(value, I32), _MAGNITUDE) for value in values_of(builder, group)]


@intrinsic
def clear(_context: Any, group: Any, byte: Any) -> Any:
    """The group with 0 for the values whose bit is set; nearly free if no bit is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, before = values_of(builder, args[0]), builder.block
        with builder.if_then(builder.icmp_unsigned("!=", args[1], I32(0))):
            inside, cleared = builder.block, []
            for i, value in enumerate(values):
                is_set = builder.icmp_unsigned("!=", builder.and_(args[1], I32(1 << i)), I32(0))
                cleared.append(builder.select(is_set, ir.Constant(F32, 0.0), value))
        either = [builder.phi(F32) for _ in values]
        for phi, value, other in zip(either, values, cleared, strict=True):
            phi.add_incoming(value, before)
            phi.add_incoming(other, inside)
        return make_tile(context, builder, signature, either)

    return _GROUP(_GROUP, types.uint32), codegen


@intrinsic
def largest_magnitude(_context: Any, group: Any, bits: Any) -> Any:
    """The largest of `bits` and the group's bits without signs: the order of magnitudes, NaN above infinity."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        largest = args[1]
        for bits in _magnitudes(builder, args[0]):
            largest = builder.select(builder.icmp_unsigned(">", bits, largest), bits, largest)
        return largest

    return types.uint32(_GROUP, types.uint32), codegen


@intrinsic
def at_least(_context: Any, group: Any, threshold: Any) -> Any:
    """The byte of the values that are NaN, or of at least the magnitude whose bits are `threshold`."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = I32(0)
        for i, bits in enumerate(_magnitudes(builder, args[0])):
            bit = builder.select(builder.icmp_unsigned(">=", bits, args[1]), I32(1 << i), I32(0))
            byte = builder.or_(byte, bit)
        return byte

    return types.uint32(_GROUP, types.uint32), codegen


@intrinsic
def quantize(_context: Any, group: Any, inv_scale: Any) -> Any:
    """rint(fl32(value * inv_scale)) as 8 int8 codes in two words, for finite values of at most 127.4 steps."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        in_steps = [multiply(builder, value, args[1]) for value in values_of(builder, args[0])]
        rounded = [call_ptx(builder, "add.rn.f32 $0, $1, $2;", "f", F32, "ff", [s, _ROUNDER]) for s in in_steps]
        codes = [builder.bitcast(value, I32) for value in rounded]

        def join(a: Any, b: Any, selector: int) -> Any:
            return call_ptx(builder, f"prmt.b32 $0, $1, $2, {selector:#x};", "r", I32, "rr", [a, b])

        pairs = [join(codes[i], codes[i + 1], 0x0040) for i in range(0, 8, 2)]
        return make_tile(context, builder, signature, [join(pairs[i], pairs[i + 1], 0x5410) for i in (0, 2)])

    return types.UniTuple(types.uint32, 2)(_GROUP, types.float32), codegen


@intrinsic
def store_codes_before(_context: Any, codes: Any, index: Any, end: Any, words: Any) -> Any:
    """Store those of the codes index ... index + 7 that come before `end`, one by one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for i in range(8):
            at = builder.add(args[1], I64(i))
            word = builder.extract_value(args[3], i // 4)
            with builder.if_then(builder.icmp_unsigned("<", at, args[2])):
                code = builder.trunc(builder.lshr(word, I32(8 * (i % 4))), ir.IntType(8))
                builder.store(code, builder.gep(args[0], [at]))
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.int64, types.UniTuple(types.uint32, 2)), codegen
