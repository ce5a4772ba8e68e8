"""exp and square root of a float32, without calls: a kernel has no mathematics library, and calls are slow."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cuda_kernels.cpu.kernels.compiled import compiled

_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_LEAST, _MOST = np.float32(-87.3), np.float32(88.3)


@intrinsic
def _power_of_two(_context: Any, n: Any) -> Any:
    """Return 2**n of an int32 from -126 to 127."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], kind(127)), kind(23)), ir.FloatType())

    return types.float32(types.int32), codegen


@compiled()
def exponential(x):  # type: ignore[no-untyped-def]
    """Return exp(x), to about two units in the last place. It saturates at exp(88.3); below -87.3 it is 0."""
    bounded = min(max(x, _LEAST), _MOST)
    n = np.rint(bounded * _LOG2_E)
    rest = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    # The Taylor series of exp at 0: for |rest| <= ln(2) / 2 its error is below half a unit in the last place.
    value = rest * np.float32(1 / 5040) + np.float32(1 / 720)
    value = value * rest + np.float32(1 / 120)
    value = value * rest + np.float32(1 / 24)
    value = value * rest + np.float32(1 / 6)
    value = value * rest + np.float32(1 / 2)
    value = (value * rest * rest + rest) + np.float32(1)
    value *= _power_of_two(np.int32(n))
    return x if x != x else (value if x >= _LEAST else np.float32(0))


@intrinsic
def square_root(_context: Any, x: Any) -> Any:
    """Return the square root of a float32, rounded once."""

    def codegen(_cg: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.sqrt.f32"), args)

    return types.float32(types.float32), codegen


@compiled()
def exponentials(x, y):  # type: ignore[no-untyped-def]
    """Write y[i] = exp(x[i])."""
    for i in range(x.size):
        y[i] = exponential(x[i])
