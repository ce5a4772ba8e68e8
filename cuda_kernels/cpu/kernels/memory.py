"""Memory of a kernel's own, and arrays that stand for any memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from cuda_kernels.cpu.kernels.compiled import compiled

_BYTE = ir.IntType(8).as_pointer()
_ALIGNMENT = 64


@intrinsic
def _malloc(_context: Any, n_bytes: Any) -> Any:
    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_BYTE, [ir.IntType(64)])
        address = builder.call(cgutils.get_or_insert_function(builder.module, kind, "malloc"), args)
        return builder.ptrtoint(address, ir.IntType(64))

    return types.intp(types.intp), codegen


@intrinsic
def release(_context: Any, address: Any) -> Any:
    """Give memory back that `allocate` returned."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE])
        free = cgutils.get_or_insert_function(builder.module, kind, "free")
        builder.call(free, [builder.inttoptr(args[0], _BYTE)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@compiled()
def allocate(n_bytes):  # type: ignore[no-untyped-def]
    """Return the address of uninitialized memory, or 0 if there is none."""
    return _malloc(n_bytes + _ALIGNMENT)


@compiled()
def aligned(address):  # type: ignore[no-untyped-def]
    """Return the next multiple of 64 from `address` on."""
    return (address + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


@intrinsic
def view(_context: Any, address: Any, shape: Any, like: Any) -> Any:
    """Return the memory at an address as a contiguous array of a shape, of the type of the scalar `like`."""
    kind = types.Array(like, shape.count, "C")
    sizes = types.UniTuple(types.intp, shape.count)

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        made = make_array(kind)(context, builder)
        dimensions = cgutils.unpack_tuple(builder, args[1], shape.count)
        item_size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_value_type(like)))
        strides = [item_size]
        for dimension in reversed(dimensions[1:]):
            strides.insert(0, builder.mul(strides[0], dimension))
        data = builder.inttoptr(args[0], context.get_value_type(types.CPointer(like)))
        populate_array(made, data, dimensions, strides, item_size, None)
        return made._getvalue()

    return kind(types.intp, sizes, like), codegen
