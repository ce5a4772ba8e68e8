"""Instructions on groups of eight adjacent values: `intrinsics`' part for quantizing activations.

A group is a tuple of eight float32, unrolled here in Python (see `tile_intrinsics`); a byte has a bit for each of its
values, the lowest for the first. Pointers, indices and formats are those of `intrinsics`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from cuda_kernels.intrinsics import _F32, _I32, _I64, _call, _widen
from cuda_kernels.product_intrinsics import _load_before
from cuda_kernels.tile_intrinsics import _multiply, _tile, _values

_GROUP = types.UniTuple(types.float32, 8)
_MAGNITUDE = _I32(0x7FFFFFFF)
_ROUNDER = ir.Constant(_F32, 1.5 * 2**23)
"""Added to a float32 of magnitude up to 2^22 it leaves no room for a fraction: the sum is rounded to an integer, ties
to even, and has its lowest byte."""


@intrinsic
def load8(_context: Any, pointer: Any, index: Any) -> Any:
    """Values index ... index + 7, by loads of 16 bytes from an address that 16 divides."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I32, 4).as_pointer()
        base = builder.bitcast(builder.gep(args[0], [args[1]]), vector)
        loads = [builder.load(builder.gep(base, [_I32(i)]), align=16) for i in range(pointer.dtype.bitwidth // 16)]
        words = [builder.extract_element(four, _I32(i)) for four in loads for i in range(4)]
        if pointer.dtype.bitwidth == 16:
            words = [half for word in words for half in (word, builder.lshr(word, _I32(16)))]
        return _tile(context, builder, signature, [_widen(builder, pointer.dtype, word) for word in words])

    return _GROUP(pointer, types.uint64), codegen


@intrinsic
def load8_before(_context: Any, pointer: Any, index: Any, end: Any) -> Any:
    """Values index ... index + 7, one by one; 0 from index `end` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = [_load_before(builder, args[0], builder.add(args[1], _I64(i)), args[2]) for i in range(8)]
        return _tile(context, builder, signature, [_widen(builder, pointer.dtype, word) for word in bits])

    return _GROUP(pointer, types.uint64, types.uint64), codegen


def _magnitudes(builder: Any, group: Any) -> list[Any]:
    return [builder.and_(builder.bitcast(value, _I32), _MAGNITUDE) for value in _values(builder, group)]


@intrinsic
def clear(_context: Any, group: Any, byte: Any) -> Any:
    """The group with 0 for the values whose bit is set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for i, value in enumerate(_values(builder, args[0])):
            is_set = builder.icmp_unsigned("!=", builder.and_(args[1], _I32(1 << i)), _I32(0))
            values.append(builder.select(is_set, ir.Constant(_F32, 0.0), value))
        return _tile(context, builder, signature, values)

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
    """A byte: which values have a magnitude of at least the one whose bits `threshold` is, or are NaN."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = _I32(0)
        for i, bits in enumerate(_magnitudes(builder, args[0])):
            bit = builder.select(builder.icmp_unsigned(">=", bits, args[1]), _I32(1 << i), _I32(0))
            byte = builder.or_(byte, bit)
        return byte

    return types.uint32(_GROUP, types.uint32), codegen


@intrinsic
def quantize(_context: Any, group: Any, inv_scale: Any) -> Any:
    """rint(fl32(value * inv_scale)) of finite values at most 127.4 apart from 0 in steps: 8 int8 codes as two words."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        in_steps = [_multiply(builder, value, args[1]) for value in _values(builder, args[0])]
        rounded = [_call(builder, "add.rn.f32 $0, $1, $2;", "f", _F32, "ff", [s, _ROUNDER]) for s in in_steps]
        codes = [builder.bitcast(value, _I32) for value in rounded]

        def join(a: Any, b: Any, selector: int) -> Any:
            return _call(builder, f"prmt.b32 $0, $1, $2, {selector:#x};", "r", _I32, "rr", [a, b])

        pairs = [join(codes[i], codes[i + 1], 0x0040) for i in range(0, 8, 2)]
        return _tile(context, builder, signature, [join(pairs[i], pairs[i + 1], 0x5410) for i in (0, 2)])

    return types.UniTuple(types.uint32, 2)(_GROUP, types.float32), codegen


@intrinsic
def store_codes_before(_context: Any, codes: Any, index: Any, end: Any, words: Any) -> Any:
    """Those of the codes index ... index + 7 that come before `end`, one by one."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        for i in range(8):
            at = builder.add(args[1], _I64(i))
            word = builder.extract_value(args[3], i // 4)
            with builder.if_then(builder.icmp_unsigned("<", at, args[2])):
                code = builder.trunc(builder.lshr(word, _I32(8 * (i % 4))), ir.IntType(8))
                builder.store(code, builder.gep(args[0], [at]))
        return context.get_dummy_value()

    return types.void(codes, types.uint64, types.uint64, types.UniTuple(types.uint32, 2)), codegen
