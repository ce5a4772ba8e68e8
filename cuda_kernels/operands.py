"""Checks of dtypes, shapes and devices that the kernels would otherwise misread.

They look at no values, so they hold for traced tensors and never wait for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cuda_kernels.reference import N_STEPS, QuantizedActivations, QuantizedWeight, n_blocks

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_COLUMNS = (2**31 - 1) // N_STEPS**2
"""The most input features whose sum of products fits int32 for any codes: 133,144."""


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"expected {name} to be {dtype} {list(shape)} on {device}, found {found}")


def check_floats(name: str, tensor: Tensor, n_dimensions: int | None = None) -> None:
    """Check for one of the three float dtypes, and for this many dimensions, or at least one."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"expected {name} to be float16, bfloat16 or float32, found {tensor.dtype}")
    if tensor.dim() != n_dimensions if n_dimensions is not None else tensor.dim() == 0:
        wanted = f"{n_dimensions} dimensions" if n_dimensions is not None else "at least one dimension"
        raise ValueError(f"expected {name} to have {wanted}, found {list(tensor.shape)}")


BLOCK_SIZES = (64, 128, 256)
"""The sizes of blocks of columns: whole steps of every product, and whole parts of a warp that quantizes them."""


def _check_block_size(block_size: int) -> None:
    if block_size and block_size not in BLOCK_SIZES:
        raise ValueError(f"expected a block size of 0, {', '.join(map(str, BLOCK_SIZES))}, found {block_size}")


def check_rule(x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int, block_size: int = 0) -> None:
    """Check stored outlier columns, the rule by which further ones are found in x, and the size of blocks."""
    _check_block_size(block_size)
    _check("outlier_columns", outlier_columns, torch.int32, outlier_columns.shape[:1], x.device)
    if capacity < 0:
        raise ValueError(f"expected a capacity of at least 0, found {capacity}")
    if capacity and not threshold > 0:
        raise ValueError(f"expected a positive threshold, found {threshold}")


def _check_weight(
    weight: QuantizedWeight[Tensor], dtype: torch.dtype, device: torch.device, n_columns: int, n_outliers: int
) -> None:
    n_rows = weight.codes.shape[0] if weight.codes.dim() else 0
    _check("weight_codes", weight.codes, torch.int8, (n_rows, n_columns), device)
    if not weight.codes.is_contiguous():
        raise ValueError(f"expected weight_codes to be contiguous, found strides {list(weight.codes.stride())}")
    if n_columns > MAX_COLUMNS:
        raise ValueError(f"expected at most {MAX_COLUMNS} input features, found {n_columns}")
    _check("weight_absmax", weight.absmax, torch.float32, (n_rows,), device)
    _check("outlier_weight", weight.outlier_weight, dtype, (n_rows, n_outliers), device)
    if weight.bias is not None:
        _check("bias", weight.bias, dtype, (n_rows,), device)


def check_product(
    x: QuantizedActivations[Tensor], weight: QuantizedWeight[Tensor], products: Tensor | None = None
) -> None:
    """Check the operands of `int8_matmul`, or, with products, those of `dequantize_epilogue`."""
    check_floats("outlier_x", x.outlier_x, 2)
    (n_tokens, n_outliers), dtype, device = x.outlier_x.shape, x.outlier_x.dtype, x.codes.device
    n_rows, n_columns = weight.codes.shape if weight.codes.dim() == 2 else (0, 0)
    _check_weight(weight, dtype, device, n_columns, n_outliers)
    _check("codes", x.codes, torch.int8, (n_tokens, n_columns), device)
    if products is not None:
        _check("products", products, torch.int32, (n_tokens, n_rows), device)
    capacity = x.found_columns.shape[0] if x.found_columns.dim() else 0
    _check_block_size(x.block_size)
    _check("x_absmax", x.absmax, torch.float32, (n_tokens, n_blocks(n_columns, x.block_size)), device)
    _check("outlier_x", x.outlier_x, dtype, (n_tokens, n_outliers), device)
    _check("found_columns", x.found_columns, torch.int32, (capacity,), device)
    _check("n_found", x.n_found, torch.int32, (1,), device)
    _check("found_x", x.found_x, dtype, (n_tokens, capacity), device)


def check_layer(x: Tensor, weight: QuantizedWeight[Tensor], outlier_columns: Tensor, *rule: Any) -> None:
    """Check the operands of `int8_linear`; `rule` is the threshold, the capacity and the block size."""
    check_floats("x", x)
    check_rule(x, outlier_columns, *rule)
    _check_weight(weight, x.dtype, x.device, x.shape[-1], outlier_columns.shape[0])
