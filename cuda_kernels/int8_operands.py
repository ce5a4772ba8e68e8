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

MOST_COLUMNS = 133_144
"""127 * 127 times so many fit into int32."""


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
    return (*pointers, types.uint32, *[types.uint64] * 5)


def epilogue_arguments(operands: Operands) -> tuple[int, ...]:
    """A kernel's last arguments, in the order of `epilogue_types`; before the sizes, whether there is a bias."""
    pointers, sizes = operands[2:12], operands[12:]
    return (*pointers, int(operands.bias != 0), *sizes)


def of_tensors(
    codes: torch.Tensor | None,
    x_absmax: torch.Tensor,
    outlier_x: torch.Tensor,
    found_columns: torch.Tensor,
    n_found: torch.Tensor,
    found_x: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_absmax: torch.Tensor,
    outlier_weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> Operands:
    """The operands that these tensors are.

    Raises:
        ValueError: a tensor of another dtype, shape, layout or device than the others want.
    """
    import torch

    (M, N), K, n, capacity = y.shape, weight_codes.shape[1], outlier_weight.shape[1], found_columns.shape[0]
    if K > MOST_COLUMNS:
        raise ValueError(f"{K} columns: a sum of more than {MOST_COLUMNS} products may not fit into int32")
    check("x_absmax", x_absmax, torch.float32, (M,), y.device)
    check("outlier_x", outlier_x, y.dtype, (M, n), y.device)
    check("found_columns", found_columns, torch.int32, (capacity,), y.device)
    check("n_found", n_found, torch.int32, (1,), y.device)
    check("found_x", found_x, y.dtype, (M, capacity), y.device)
    check("weight_codes", weight_codes, torch.int8, (N, K), y.device)
    check("weight_absmax", weight_absmax, torch.float32, (N,), y.device)
    check("outlier_weight", outlier_weight, y.dtype, (N, n), y.device)
    if codes is not None:
        check("codes", codes, torch.int8, (M, K), y.device)
    if bias is not None:
        check("bias", bias, y.dtype, (N,), y.device)
    tensors = (x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
    addresses = [tensor.data_ptr() for tensor in tensors]
    codes_at, bias_at = (0 if tensor is None else tensor.data_ptr() for tensor in (codes, bias))
    return Operands._make((format_of(y), codes_at, *addresses, bias_at, y.data_ptr(), M, N, K, n, capacity))


def format_of(values: torch.Tensor) -> str:
    """ "F16", "BF16" or "F32".

    Raises:
        ValueError: of another dtype.
    """
    import torch

    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    if values.dtype not in names:
        raise ValueError(f"{values.dtype} is not float16, bfloat16 or float32")
    return names[values.dtype]


def check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises a ValueError unless the tensor is contiguous, and of this dtype, shape and device."""
    found = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
    if found != (dtype, shape, device, True):
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}; "
            f"expected contiguous {dtype} {list(shape)} on {device}"
        )
