"""Instructions on single values and vectors that Numba-CUDA lacks, as inline PTX.

Pointers are `CPointer(T)` arguments of a kernel, or shared arrays if a docstring says so. Indices count elements of T,
and T names the format, as in `cpu.BITS_DTYPE`: uint16 is fp16, int16 is bf16, uint32 and float32 are fp32. Vectors are
words: uint32, the value with the lower index in the lower bits. An address must be a multiple of the bytes moved.

Importing this module needs numba-cuda, but no device.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import TypingError
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic

from cuda_kernels.cuda.ptx.code_generation import (
    CONSTRAINT,
    F32,
    I32,
    I64,
    IR_TYPE,
    call_ptx,
    device_function,
    instruction,
    narrow,
    widen,
)

# Arithmetic. The `_rn` forms are never contracted into an fma, which rounds once; the method rounds twice.

multiply_rn = instruction("multiply_rn", "mul.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)
add_rn = instruction("add_rn", "add.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)
reciprocal_rn = instruction("reciprocal_rn", "rcp.rn.f32 $0, $1;", types.float32, types.float32)
"""1 / x, correctly rounded: equal to a division, subnormal x included."""

population_count = instruction("population_count", "popc.b32 $0, $1;", types.uint32, types.uint32)
permute_bytes = instruction(
    "permute_bytes", "prmt.b32 $0, $1, $2, $3;", types.uint32, types.uint32, types.uint32, types.uint32
)
"""permute_bytes(a, b, selector): four of the eight bytes b:a, one hexadecimal digit each, the lowest byte's first."""


# Bits and numbers.


def _conversion(name: str, result: Any, operand: Any, convert: Any, format: Any) -> Any:
    def typed(_context: Any, _value: Any) -> Any:
        return result(operand), lambda _cg, builder, _signature, args: convert(builder, format, args[0])

    return device_function(name, 1, typed)


bits_as_float = _conversion("bits_as_float", types.float32, types.uint32, widen, types.uint32)
float_as_bits = _conversion("float_as_bits", types.uint32, types.float32, narrow, types.uint32)


@intrinsic
def element_bytes(_context: Any, pointer: Any) -> Any:
    """element_bytes(pointer) -> uint32, a constant: branches on it cost nothing."""

    def codegen(_cg: Any, _builder: Any, _signature: Any, _args: Any) -> Any:
        return ir.Constant(I32, pointer.dtype.bitwidth // 8)

    return types.uint32(pointer), codegen


def _max_u16x2(builder: Any, a: Any, b: Any) -> Any:
    if ConfigStack.top_or_none().compute_capability >= (9, 0):
        return call_ptx(builder, "max.u16x2 $0, $1, $2;", "r", I32, "rr", [a, b])
    halves = []
    for mask in (0xFFFF, 0xFFFF0000):
        x, y = (builder.and_(word, ir.Constant(I32, mask)) for word in (a, b))
        halves.append(builder.select(builder.icmp_unsigned(">", x, y), x, y))
    return builder.or_(*halves)


@intrinsic
def larger_magnitudes(_context: Any, pointer: Any, largest: Any, word: Any) -> Any:
    """larger_magnitudes(pointer, largest, word) -> uint32: of each value in a word, the larger magnitude's bits.

    The bits of IEEE numbers without their sign are ordered as the magnitudes are, infinity and then NaN at the top.
    Two 16-bit values take one maximum from sm_90 on, and five instructions more before.
    """

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        is_wide = pointer.dtype.bitwidth == 32
        magnitudes = builder.and_(args[2], ir.Constant(I32, 0x7FFFFFFF if is_wide else 0x7FFF7FFF))
        if not is_wide:
            return _max_u16x2(builder, args[1], magnitudes)
        return builder.select(builder.icmp_unsigned(">", args[1], magnitudes), args[1], magnitudes)

    return types.uint32(pointer, types.uint32, types.uint32), codegen


@intrinsic
def low_as_float(_context: Any, pointer: Any, word: Any) -> Any:
    """low_as_float(pointer, word) -> float32: the lower half of a word, in the 16-bit format of the pointer."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return widen(builder, pointer.dtype, args[1])

    return types.float32(pointer, types.uint32), codegen


@intrinsic
def high_as_float(_context: Any, pointer: Any, word: Any) -> Any:
    """high_as_float(pointer, word) -> float32: the upper half of a word, in the 16-bit format of the pointer."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if pointer.dtype == types.int16:  # bf16 is the upper half of float32
            return builder.bitcast(builder.and_(args[1], ir.Constant(I32, 0xFFFF0000)), F32)
        return widen(builder, pointer.dtype, builder.lshr(args[1], ir.Constant(I32, 16)))

    return types.float32(pointer, types.uint32), codegen


# Memory.


def _address(context: Any, builder: Any, signature: Any, args: Any, target: Any) -> Any:
    """The address of an element as a pointer to `target`: the arguments are the array and the index."""
    owner, index = args[0], args[1]
    # A narrow index would be sign-extended by the address computation, unsigned or not.
    if index.type.width < 64:
        index = (builder.sext if signature.args[1].signed else builder.zext)(index, I64)
    if isinstance(signature.args[0], types.Array):
        owner = context.make_array(signature.args[0])(context, builder, owner).data
    return builder.bitcast(builder.gep(owner, [index]), ir.PointerType(target))


def _tuple(context: Any, builder: Any, signature: Any, made: Any, n: int) -> Any:
    return context.make_tuple(builder, signature.return_type, [builder.extract_value(made, k) for k in range(n)])


@intrinsic
def load_16_bytes(_context: Any, pointer: Any, index: Any) -> Any:
    """load_16_bytes(pointer, index) -> 4 words; the pointer may be a shared array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.load(_address(context, builder, signature, args, ir.VectorType(I32, 4)), align=16)
        words = [builder.extract_element(vector, ir.Constant(I32, k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4)(pointer, index), codegen


@intrinsic
def stream_16_bytes(_context: Any, pointer: Any, index: Any) -> Any:
    """stream_16_bytes(pointer, index) -> 4 words, bypassing L1, from global memory that this launch does not write."""
    ptx = "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, signature, args, I32), I64)
        words = call_ptx(builder, ptx, "rrrr", ir.LiteralStructType([I32] * 4), "l", [address])
        return _tuple(context, builder, signature, words, 4)

    return types.UniTuple(types.uint32, 4)(pointer, index), codegen


def _store(name: str, n_words: int, ptx: str) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(I32, n_words)
        address = _address(context, builder, signature, args, vector)
        if ptx:
            operands = [builder.ptrtoint(address, I64), *args[2:]]
            call_ptx(builder, ptx, "", ir.VoidType(), "l" + "r" * n_words, operands, True)
        else:
            value = ir.Constant(vector, ir.Undefined)
            for k, word in enumerate(args[2:]):
                value = builder.insert_element(value, word, ir.Constant(I32, k))
            builder.store(value, address, align=4 * n_words)
        return context.get_dummy_value()

    def typed(_context: Any, pointer: Any, index: Any, *words: Any) -> Any:
        return types.void(pointer, index, *[types.uint32] * n_words), codegen

    return device_function(name, 2 + n_words, typed)


store_8_bytes = _store("store_8_bytes", 2, "")
store_16_bytes = _store("store_16_bytes", 4, "")
"""store_16_bytes(pointer, index, *words); the pointer may be a shared array."""

stream_store_4_bytes = _store("stream_store_4_bytes", 1, "st.global.cs.b32 [$0], $1;")
stream_store_8_bytes = _store("stream_store_8_bytes", 2, "st.global.cs.v2.b32 [$0], {$1,$2};")
"""stream_store_8_bytes(pointer, index, *words) to global memory, to be evicted first: it is not read soon."""


# One value, in the format its pointer names.


@intrinsic
def load_float(_context: Any, pointer: Any, index: Any) -> Any:
    """load_float(pointer, index) -> float32, exactly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = ir.IntType(pointer.dtype.bitwidth)
        bits = builder.load(_address(context, builder, signature, args, stored))
        return widen(builder, pointer.dtype, bits if stored.width == 32 else builder.zext(bits, I32))

    return types.float32(pointer, index), codegen


# Lanes of a warp. All 32 take part.


def _shuffle(name: str, mode: str, clamp: str) -> Any:
    def typed(_context: Any, value: Any, _lane: Any) -> Any:
        if value not in CONSTRAINT or IR_TYPE[value] == I64:
            raise TypingError(f"{name} moves 32 bits, not {value}; uint32 + uint32 is uint64 in Numba")
        ptx = f"shfl.sync.{mode}.b32 $0, $1, $2, {clamp}, 0xffffffff;"

        def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
            letter = CONSTRAINT[value]
            return call_ptx(builder, ptx, letter, IR_TYPE[value], letter + "r", args, True)

        return value(value, types.uint32), codegen

    return device_function(name, 2, typed)


shuffle_xor = _shuffle("shuffle_xor", "bfly", "0x1f")
shuffle_up = _shuffle("shuffle_up", "up", "0x0")
"""shuffle_*(value, lane): a 32-bit value of the lane `own ^ lane` or `own - lane`, its own if there is no such lane."""
