"""Instructions that Numba-CUDA has no name for; all inline PTX of this package is here, so that a move stays cheap.

Pointers are `CPointer(T)` arguments of a kernel, or shared arrays where that is said; indices count elements of T, and
T names the format, as in `cpu.BITS_DTYPE`: uint16 is fp16, int16 is bf16, uint32 and float32 are fp32. Vectors are
words: uint32, the value with the lower index in the lower bits. An address must be a multiple of what is moved.

Each is code generation, done anew for every kernel and compute capability. Importing this module needs numba-cuda, but
no device.
"""

from __future__ import annotations

import inspect
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import TypingError
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_IR = {types.int32: _I32, types.uint32: _I32, types.uint64: _I64, types.float32: _F32}
_LETTER = {types.int32: "r", types.uint32: "r", types.uint64: "l", types.float32: "f"}


def _device_function(name: str, n_arguments: int, typed: Any) -> Any:
    """`intrinsic` for functions made in a loop: Numba asks a function for its name and how many arguments it takes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__name__ = typed.__qualname__ = name
    typed.__signature__ = inspect.Signature([inspect.Parameter(f"a{k}", kind) for k in range(n_arguments + 1)])
    return intrinsic(typed)


def _call(builder: Any, ptx: str, results: str, result: Any, operands: str, args: Any, volatile: bool = False) -> Any:
    """One instruction; `results` and `operands` are constraint letters: r and l are 32 and 64 bits, h 16, f float32."""
    constraints = ",".join([*("=" + letter for letter in results), *operands])
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(ir.InlineAsm(function, ptx, constraints, side_effect=volatile), args)


def _instruction(name: str, ptx: str, result: Any, *operands: Any) -> Any:
    """The device function `name(*operands) -> result` that is the one instruction `ptx`."""
    letters = "".join(_LETTER[operand] for operand in operands)

    def typed(_context: Any, *_args: Any) -> Any:
        def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return _call(builder, ptx, _LETTER[result], _IR[result], letters, args)

        return result(*operands), codegen

    return _device_function(name, len(operands), typed)


# Arithmetic. The `_rn` forms are never contracted into an fma, which would round once where the method rounds twice.

multiply_rn = _instruction("multiply_rn", "mul.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)
add_rn = _instruction("add_rn", "add.rn.f32 $0, $1, $2;", types.float32, types.float32, types.float32)
reciprocal_rn = _instruction("reciprocal_rn", "rcp.rn.f32 $0, $1;", types.float32, types.float32)
"""1 / x, correctly rounded: equal to a division, subnormal x included."""

population_count = _instruction("population_count", "popc.b32 $0, $1;", types.uint32, types.uint32)
permute_bytes = _instruction(
    "permute_bytes", "prmt.b32 $0, $1, $2, $3;", types.uint32, types.uint32, types.uint32, types.uint32
)
"""permute_bytes(a, b, selector): four of the eight bytes b:a, one hexadecimal digit each, the lowest byte's first."""


# Bits and numbers.


def _widen(builder: Any, format: Any, bits: Any) -> Any:
    """IR for the value of 16 bits in the lower half of a uint32, whose upper half is ignored, or of 32 bits."""
    if format == types.uint16:
        return _call(builder, "cvt.f32.f16 $0, $1;", "f", _F32, "h", [builder.trunc(bits, _I16)])
    if format == types.int16:
        bits = builder.shl(bits, ir.Constant(_I32, 16))
    return builder.bitcast(bits, _F32)


def _narrow(builder: Any, format: Any, x: Any) -> Any:
    """IR for the nearest value in a format, ties to even, as bits in the lower part of a uint32."""
    if format == types.uint16:
        return builder.zext(_call(builder, "cvt.rn.f16.f32 $0, $1;", "h", _I16, "f", [x]), _I32)
    bits = builder.bitcast(x, _I32)
    if format == types.int16:  # in integers, for the instruction came with sm_80 only
        half = ir.Constant(_I32, 16)
        even = builder.and_(builder.lshr(bits, half), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), even), half)
        return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(_I32, 0x7FC0), rounded)
    return bits


def _conversion(name: str, result: Any, operand: Any, convert: Any, format: Any) -> Any:
    def typed(_context: Any, _value: Any) -> Any:
        return result(operand), lambda _cg, builder, _signature, args: convert(builder, format, args[0])

    return _device_function(name, 1, typed)


bits_as_float = _conversion("bits_as_float", types.float32, types.uint32, _widen, types.uint32)
float_as_bits = _conversion("float_as_bits", types.uint32, types.float32, _narrow, types.uint32)


@intrinsic
def element_bytes(_context: Any, pointer: Any) -> Any:
    """element_bytes(pointer) -> uint32, a constant: branches on it cost nothing."""

    def codegen(_cg: Any, _builder: Any, _signature: Any, _args: Any) -> Any:
        return ir.Constant(_I32, pointer.dtype.bitwidth // 8)

    return types.uint32(pointer), codegen


def _max_u16x2(builder: Any, a: Any, b: Any) -> Any:
    if ConfigStack.top_or_none().compute_capability >= (9, 0):
        return _call(builder, "max.u16x2 $0, $1, $2;", "r", _I32, "rr", [a, b])
    halves = []
    for mask in (0xFFFF, 0xFFFF0000):
        x, y = (builder.and_(word, ir.Constant(_I32, mask)) for word in (a, b))
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
        magnitudes = builder.and_(args[2], ir.Constant(_I32, 0x7FFFFFFF if is_wide else 0x7FFF7FFF))
        if not is_wide:
            return _max_u16x2(builder, args[1], magnitudes)
        return builder.select(builder.icmp_unsigned(">", args[1], magnitudes), args[1], magnitudes)

    return types.uint32(pointer, types.uint32, types.uint32), codegen


@intrinsic
def low_as_float(_context: Any, pointer: Any, word: Any) -> Any:
    """low_as_float(pointer, word) -> float32: the lower half of a word, in the 16-bit format of the pointer."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _widen(builder, pointer.dtype, args[1])

    return types.float32(pointer, types.uint32), codegen


@intrinsic
def high_as_float(_context: Any, pointer: Any, word: Any) -> Any:
    """high_as_float(pointer, word) -> float32: the upper half of a word, in the 16-bit format of the pointer."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if pointer.dtype == types.int16:  # bf16 is already where float32 wants it
            return builder.bitcast(builder.and_(args[1], ir.Constant(_I32, 0xFFFF0000)), _F32)
        return _widen(builder, pointer.dtype, builder.lshr(args[1], ir.Constant(_I32, 16)))

    return types.float32(pointer, types.uint32), codegen


# Memory.


def _address(context: Any, builder: Any, signature: Any, args: Any, target: Any) -> Any:
    """Where the second argument's element of the first is, as a pointer to `target`."""
    owner, index = args[0], args[1]
    # A narrow index would be sign-extended by the address computation, unsigned or not.
    if index.type.width < 64:
        index = (builder.sext if signature.args[1].signed else builder.zext)(index, _I64)
    if isinstance(signature.args[0], types.Array):
        owner = context.make_array(signature.args[0])(context, builder, owner).data
    return builder.bitcast(builder.gep(owner, [index]), ir.PointerType(target))


def _tuple(context: Any, builder: Any, signature: Any, made: Any, n: int) -> Any:
    return context.make_tuple(builder, signature.return_type, [builder.extract_value(made, k) for k in range(n)])


@intrinsic
def load_16_bytes(_context: Any, pointer: Any, index: Any) -> Any:
    """load_16_bytes(pointer, index) -> 4 words; the pointer may be a shared array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.load(_address(context, builder, signature, args, ir.VectorType(_I32, 4)), align=16)
        words = [builder.extract_element(vector, ir.Constant(_I32, k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4)(pointer, index), codegen


@intrinsic
def stream_16_bytes(_context: Any, pointer: Any, index: Any) -> Any:
    """stream_16_bytes(pointer, index) -> 4 words, read around L1, of global memory that this launch does not write."""
    ptx = "ld.global.nc.L1::no_allocate.v4.b32 {$0,$1,$2,$3}, [$4];"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(_address(context, builder, signature, args, _I32), _I64)
        words = _call(builder, ptx, "rrrr", ir.LiteralStructType([_I32] * 4), "l", [address])
        return _tuple(context, builder, signature, words, 4)

    return types.UniTuple(types.uint32, 4)(pointer, index), codegen


def _store(name: str, n_words: int, ptx: str) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I32, n_words)
        address = _address(context, builder, signature, args, vector)
        if ptx:
            operands = [builder.ptrtoint(address, _I64), *args[2:]]
            _call(builder, ptx, "", ir.VoidType(), "l" + "r" * n_words, operands, True)
        else:
            value = ir.Constant(vector, ir.Undefined)
            for k, word in enumerate(args[2:]):
                value = builder.insert_element(value, word, ir.Constant(_I32, k))
            builder.store(value, address, align=4 * n_words)
        return context.get_dummy_value()

    def typed(_context: Any, pointer: Any, index: Any, *words: Any) -> Any:
        return types.void(pointer, index, *[types.uint32] * n_words), codegen

    return _device_function(name, 2 + n_words, typed)


store_8_bytes = _store("store_8_bytes", 2, "")
store_16_bytes = _store("store_16_bytes", 4, "")
"""store_16_bytes(pointer, index, *words); the pointer may be a shared array."""

stream_store_4_bytes = _store("stream_store_4_bytes", 1, "st.global.cs.b32 [$0], $1;")
stream_store_8_bytes = _store("stream_store_8_bytes", 2, "st.global.cs.v2.b32 [$0], {$1,$2};")
"""stream_store_8_bytes(pointer, index, *words) to global memory, to be evicted first: no one reads it soon."""


# One value, in the format its pointer names.


@intrinsic
def load_float(_context: Any, pointer: Any, index: Any) -> Any:
    """load_float(pointer, index) -> float32, exactly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = ir.IntType(pointer.dtype.bitwidth)
        bits = builder.load(_address(context, builder, signature, args, stored))
        return _widen(builder, pointer.dtype, bits if stored.width == 32 else builder.zext(bits, _I32))

    return types.float32(pointer, index), codegen


# Lanes of a warp. All 32 take part.


def _shuffle(name: str, mode: str, clamp: str) -> Any:
    def typed(_context: Any, value: Any, _lane: Any) -> Any:
        if value not in _LETTER or _IR[value] == _I64:
            raise TypingError(f"{name} moves 32 bits, not {value}; uint32 + uint32 is uint64 in Numba")
        ptx = f"shfl.sync.{mode}.b32 $0, $1, $2, {clamp}, 0xffffffff;"

        def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
            letter = _LETTER[value]
            return _call(builder, ptx, letter, _IR[value], letter + "r", args, True)

        return value(value, types.uint32), codegen

    return _device_function(name, 2, typed)


shuffle_xor = _shuffle("shuffle_xor", "bfly", "0x1f")
shuffle_up = _shuffle("shuffle_up", "up", "0x0")
"""shuffle_*(value, lane): a 32-bit value of the lane `own ^ lane` or `own - lane`, its own where there is none."""
