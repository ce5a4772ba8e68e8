"""The Numba type of one vector of values in registers.

Only intrinsics make and use such values, with the functions here that load, store and shuffle them. Numba passes them
between variables and functions, alone or in tuples. LLVM splits a vector that is wider than the machine's into several
registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

_INT32 = ir.IntType(32)


class VectorType(types.Type):  # type: ignore[misc]
    """`n` values of the LLVM type `value`, named as Numba would name them."""

    def __init__(self, name: str, value: ir.Type, n: int) -> None:
        self.llvm = ir.VectorType(value, n)
        super().__init__(name=name)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, data_model_manager: Any, vector: VectorType) -> None:
        super().__init__(data_model_manager, vector, vector.llvm)


def load(builder: Any, kind: ir.Type, address: Any, offset: int = 0) -> Any:
    """IR that loads a value of an LLVM type at an address, which is an integer of any alignment, plus `offset`."""
    return builder.load(_pointer(builder, kind, address, offset), align=1)


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """IR that stores a value at an address, which is an integer of any alignment, plus `offset`."""
    builder.store(value, _pointer(builder, value.type, address, offset), align=1)


def _pointer(builder: Any, kind: ir.Type, address: Any, offset: int) -> Any:
    return builder.inttoptr(builder.add(address, ir.Constant(address.type, offset)), kind.as_pointer())


def pick(builder: Any, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    """IR of the vector of these lanes, which count on from those of `a` to those of `b`."""
    mask = [_INT32(lane) for lane in lanes]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(mask)), mask))


def repeat(builder: Any, value: Any, n: int) -> Any:
    """IR of the vector of n times one value."""
    undefined = ir.Constant(ir.VectorType(value.type, n), ir.Undefined)
    return pick(builder, builder.insert_element(undefined, value, _INT32(0)), undefined, [0] * n)


def prefetch(builder: Any, address: Any, ahead: int) -> None:
    """IR that asks for the cache line `ahead` bytes after an address, which need not be there."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
    at = builder.inttoptr(builder.add(address, address.type(ahead)), byte)
    fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(fetch, [at, _INT32(0), _INT32(3), _INT32(1)])


def addresses(builder: Any, rows: Sequence[Any], count: int) -> list[Any]:
    """IR of `count` addresses: of the first of `rows`, a stride apart, but none past the n rows that follow it."""
    first, stride, n = rows
    last = builder.add(first, builder.mul(stride, n))
    addresses = [builder.add(first, builder.mul(stride, first.type(i))) for i in range(count)]
    return [builder.select(builder.icmp_signed("<", each, last), each, last) for each in addresses]
