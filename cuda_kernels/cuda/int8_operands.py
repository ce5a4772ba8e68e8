"""What an int8 product is made of, as the kernels take it: addresses and sizes, and where they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from numba.cuda import types

if TYPE_CHECKING:
    import torch

POINTER = {
    "F16": types.CPointer(types.uint16),
    "BF16": types.CPointer(types.int16),
    "F32": types.CPointer(types.uint32),
}
"""How a kernel sees values of each dtype: the integer type of their bits names the format."""


class Operands(NamedTuple):
    """Addresses and sizes; shapes, dtypes and meaning as in `reference.int8_matmul`, every array contiguous.

    dtype: "F16", "BF16" or "F32", of outlier_x, found_x, outlier_weight, bias and y.
    codes: 0 where the products are at hand.
    bias: 0 for none.
    """

    dtype: str
    codes: int
    x_absmax: int
    outlier_x: int
    found_columns: int
    n_found: int
    found_x: int
    weight_codes: int
    weight_absmax: int
    outlier_weight: int
    bias: int
    y: int
    n_tokens: int
    n_features: int
    n_columns: int
    n_outliers: int
    capacity: int


def epilogue_types(dtype: str) -> tuple[Any, ...]:
    """The types of a kernel's last arguments, from x_absmax on."""
    values, floats, columns = POINTER[dtype], types.CPointer(types.float32), types.CPointer(types.int32)
    pointers = (floats, values, columns, columns, values, types.CPointer(types.int8), floats, values, values, values)
    return (*pointers, types.uint32, *[types.int64] * 5)


def epilogue_arguments(operands: Operands) -> tuple[int, ...]:
    """A kernel's last arguments, in the order of `epilogue_types`; before the sizes, whether there is a bias."""
    pointers, sizes = operands[2:12], operands[12:]
    return (*pointers, int(operands.bias != 0), *sizes)


def of_tensors(
    codes: torch.Tensor | None, terms: list[torch.Tensor], bias: torch.Tensor | None, y: torch.Tensor
) -> Operands:
    """The operands that these tensors are: contiguous, on one device, and fitting together.

    Args:
        terms: from x_absmax to outlier_weight.
    """
    codes_at, bias_at = (0 if tensor is None else tensor.data_ptr() for tensor in (codes, bias))
    _, _, found_columns, _, _, weight_codes, _, outlier_weight = terms
    sizes = (*y.shape, weight_codes.shape[1], outlier_weight.shape[1], found_columns.shape[0])
    addresses = [tensor.data_ptr() for tensor in terms]
    return Operands._make((format_of(y), codes_at, *addresses, bias_at, y.data_ptr(), *sizes))


def format_of(values: torch.Tensor) -> str:
    """ "F16", "BF16" or "F32"."""
    import torch

    return {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[values.dtype]
