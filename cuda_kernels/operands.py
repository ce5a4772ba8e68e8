"""What the operators refuse: dtypes, shapes and devices that the kernels would misread.

Shapes and dtypes only, no values, so that it holds for traced tensors and costs a device nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_kernels.reference import N_STEPS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_COLUMNS = (2**31 - 1) // N_STEPS**2
"""Input features whose products certainly sum up within int32: 133,144."""


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"expected {name} to be {dtype} {list(shape)} on {device}, found {found}")


def check_floats(name: str, tensor: Tensor, n_dimensions: int | None = None) -> None:
    """A tensor of one of the three float dtypes, with this many dimensions or at least one."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"expected {name} to be float16, bfloat16 or float32, found {tensor.dtype}")
    if tensor.dim() != n_dimensions if n_dimensions is not None else tensor.dim() == 0:
        wanted = f"{n_dimensions} dimensions" if n_dimensions is not None else "at least one dimension"
        raise ValueError(f"expected {name} to have {wanted}, found {list(tensor.shape)}")


def check_outliers(x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int) -> None:
    """Stored outlier columns, and the rule by which further ones are found in x."""
    _check("outlier_columns", outlier_columns, torch.int32, outlier_columns.shape[:1], x.device)
    if capacity < 0:
        raise ValueError(f"expected a capacity of at least 0, found {capacity}")
    if capacity and not threshold > 0:
        raise ValueError(f"expected a positive threshold, found {threshold}")


def _check_weight(
    dtype: torch.dtype,
    device: torch.device,
    n_columns: int,
    n_outliers: int,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
) -> None:
    n_rows = weight_codes.shape[0] if weight_codes.dim() else 0
    _check("weight_codes", weight_codes, torch.int8, (n_rows, n_columns), device)
    if not weight_codes.is_contiguous():
        raise ValueError(f"expected weight_codes to be contiguous, found strides {list(weight_codes.stride())}")
    if n_columns > MAX_COLUMNS:
        raise ValueError(f"expected at most {MAX_COLUMNS} input features, found {n_columns}")
    _check("weight_absmax", weight_absmax, torch.float32, (n_rows,), device)
    _check("outlier_weight", outlier_weight, dtype, (n_rows, n_outliers), device)
    if bias is not None:
        _check("bias", bias, dtype, (n_rows,), device)


def check_product(
    name: str,
    matrix: Tensor,
    x_absmax: Tensor,
    outlier_x: Tensor,
    found_columns: Tensor,
    n_found: Tensor,
    found_x: Tensor,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
) -> None:
    """The operands of `int8_matmul`, whose `matrix` is the codes, or of `dequantize_epilogue`: the products."""
    check_floats("outlier_x", outlier_x, 2)
    (n_tokens, n_outliers), dtype, device = outlier_x.shape, outlier_x.dtype, matrix.device
    n_rows, n_columns = weight_codes.shape if weight_codes.dim() == 2 else (0, 0)
    _check_weight(dtype, device, n_columns, n_outliers, weight_codes, weight_absmax, outlier_weight, bias)
    if name == "codes":
        _check(name, matrix, torch.int8, (n_tokens, n_columns), device)
    else:
        _check(name, matrix, torch.int32, (n_tokens, n_rows), device)
    capacity = found_columns.shape[0] if found_columns.dim() else 0
    _check("x_absmax", x_absmax, torch.float32, (n_tokens,), device)
    _check("outlier_x", outlier_x, dtype, (n_tokens, n_outliers), device)
    _check("found_columns", found_columns, torch.int32, (capacity,), device)
    _check("n_found", n_found, torch.int32, (1,), device)
    _check("found_x", found_x, dtype, (n_tokens, capacity), device)


def check_layer(
    x: Tensor,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_columns: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    capacity: int,
) -> None:
    """The operands of `int8_linear`."""
    check_floats("x", x)
    check_outliers(x, outlier_columns, threshold, capacity)
    n_columns, n_outliers = x.shape[-1], outlier_columns.shape[0]
    _check_weight(x.dtype, x.device, n_columns, n_outliers, weight_codes, weight_absmax, outlier_weight, bias)
