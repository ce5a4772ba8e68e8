"""The Numba type of one vector of values in registers.

Only intrinsics make and use such values. Numba passes them between variables and functions. LLVM splits a vector that
is wider than the machine's into several registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model


class VectorType(types.Type):  # type: ignore[misc]
    """`n` values of the LLVM type `value`, named as Numba would name them."""

    def __init__(self, name: str, value: ir.Type, n: int) -> None:
        self.llvm = ir.VectorType(value, n)
        super().__init__(name=name)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, data_model_manager: Any, vector: VectorType) -> None:
        super().__init__(data_model_manager, vector, vector.llvm)


def load(builder: Any, vector: VectorType, address: Any) -> Any:
    """IR that loads the vector at an address, which is an integer of any alignment."""
    return builder.load(builder.inttoptr(address, vector.llvm.as_pointer()), align=1)
