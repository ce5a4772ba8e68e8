"""The operations as torch operators in the namespace `cuda_kernels`: for CPU, for CUDA, and for tracing without values.

Importing this module registers them; nothing is compiled, and no device is asked anything, before the first call. The
CUDA kernels of an operation are imported when a CUDA tensor first comes to it.

`reference` says what the operations mean. What is refused is refused in one line, `expected ..., found ...`, while
tracing as well as while running. Left out on purpose: reading values of CUDA tensors to check them, which would make
the host wait for the device; that `outlier_columns` are ascending column indices is checked on the CPU alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cuda_kernels.registration  # noqa: F401

Activations = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What `activation_quantize` returns, in this order."""


def row_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight rows -> int8 codes, absmax, and what rounding cost; see `reference.row_quantize`.

    Args:
        weight: float16, bfloat16 or float32 [rows, cols]; copied first where its last stride is not 1.

    Returns:
        codes int8 [rows, cols], absmax float32 [rows], signal and noise float64 [rows].
    """
    return torch.ops.cuda_kernels.row_quantize(weight)  # type: ignore[no-any-return]


def activation_quantize(x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int) -> Activations:
    """Tokens -> int8 codes beside their outlier columns; see `reference.activation_quantize`.

    Args:
        x: float16, bfloat16 or float32 [M, K]; rows may lie apart; copied first where its last stride is not 1.
        outlier_columns: int32 [n], ascending, each once; on the CPU checked, on CUDA not.
        threshold: positive; rounded to float32, and compared with x widened to it.
        capacity: how many further columns may be found.

    Returns:
        codes int8 [M, K], absmax float32 [M], outlier_x [M, n], found_columns int32 [capacity], n_found int32 [1],
        found_x [M, capacity].
    """
    return torch.ops.cuda_kernels.activation_quantize(x, outlier_columns, threshold, capacity)  # type: ignore[no-any-return]


def int8_matmul(
    codes: Tensor,
    x_absmax: Tensor,
    outlier_x: Tensor,
    found_columns: Tensor,
    n_found: Tensor,
    found_x: Tensor,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Quantized activations times a quantized weight; see `reference.int8_matmul`.

    Args:
        codes, x_absmax, outlier_x, found_columns, n_found, found_x: what `activation_quantize` returns.
        weight_codes: int8 [N, K], contiguous. weight_absmax: float32 [N].
        outlier_weight: [N, n] in the dtype of x. bias: [N] in the dtype of x, or None.

    Returns:
        [M, N] in the dtype of `outlier_x`, summed in float32 and rounded once.
    """
    x = (x_absmax, outlier_x, found_columns, n_found, found_x)
    weight = (weight_codes, weight_absmax, outlier_weight, bias)
    return torch.ops.cuda_kernels.int8_matmul(codes, *x, *weight)  # type: ignore[no-any-return]


def dequantize_epilogue(
    products: Tensor,
    x_absmax: Tensor,
    outlier_x: Tensor,
    found_columns: Tensor,
    n_found: Tensor,
    found_x: Tensor,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Integer products -> outputs, where another library multiplied; see `reference.dequantize_epilogue`.

    Args:
        products: int32 [M, N], codes @ weight_codes.T. The others as for `int8_matmul`.
    """
    x = (x_absmax, outlier_x, found_columns, n_found, found_x)
    weight = (weight_codes, weight_absmax, outlier_weight, bias)
    return torch.ops.cuda_kernels.dequantize_epilogue(products, *x, *weight)  # type: ignore[no-any-return]


def int8_linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_absmax: Tensor,
    outlier_columns: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    capacity: int,
) -> Tensor:
    """A Linear layer in LLM.int8(): `activation_quantize`, then `int8_matmul`.

    Differentiable in x and bias, with the weight frozen. Rounding is passed straight through: the gradient is that of
    x @ weight.T with

        weight[n, k] = weight_codes[n, k] * weight_absmax[n] / 127, outlier_weight[n, j] in stored column j

    so it is exact in the stored outlier columns, and adapters around and below the layer train. It takes the whole
    dequantized weight in memory for the time of one product.

    Args:
        x: float16, bfloat16 or float32 [..., K]; copied first where its last stride is not 1, or its tokens are not all
            one stride apart.
        weight_codes, weight_absmax, outlier_weight, bias: as for `int8_matmul`.
        outlier_columns, threshold, capacity: as for `activation_quantize`.

    Returns:
        [..., N] in the dtype of x.
    """
    weight = (weight_codes, weight_absmax, outlier_columns, outlier_weight, bias)
    return torch.ops.cuda_kernels.int8_linear(x, *weight, threshold, capacity)  # type: ignore[no-any-return]
