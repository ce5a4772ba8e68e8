"""The operations as torch operators in the namespace `cuda_kernels`: on CPU, on CUDA, and traced without values.

Importing this module registers them. It compiles nothing and queries no device before the first call. The CUDA kernels
of an operation are imported when it first gets a CUDA tensor.

`reference` defines the operations. Wrong dtypes, shapes and devices raise one line, `expected ..., found ...`, traced
or not. Values of CUDA tensors are not checked, because the host would have to wait for the device: whether
`outlier_columns` are ascending column indices is checked on the CPU alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cuda_kernels.reference import QuantizedActivations, QuantizedRows, QuantizedWeight
from cuda_kernels.registration import run_int8_linear


def row_quantize(weight: Tensor) -> QuantizedRows[Tensor]:
    """Quantize weight rows; see `reference.row_quantize`.

    Args:
        weight: float16, bfloat16 or float32 [rows, cols]; copied first if its last stride is not 1.
    """
    return QuantizedRows(*torch.ops.cuda_kernels.row_quantize(weight))


def activation_quantize(
    x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int, block_size: int = 0
) -> QuantizedActivations[Tensor]:
    """Quantize the blocks of tokens, their outlier columns set aside; see `reference.activation_quantize`.

    Args:
        x: float16, bfloat16 or float32 [M, K]; rows may lie apart; copied first if its last stride is not 1.
        outlier_columns: int32 [n], ascending, each once; checked on the CPU, not on CUDA.
        threshold: positive; rounded to float32, and compared with x widened to it.
        capacity: how many further columns may be found.
        block_size: 64, 128 or 256 columns that share a scale, or 0 for one scale a token.
    """
    rule = (outlier_columns, threshold, capacity, block_size)
    found = QuantizedActivations[Tensor](*torch.ops.cuda_kernels.activation_quantize(x, *rule))
    return found._replace(block_size=block_size)


def int8_matmul(x: QuantizedActivations[Tensor], weight: QuantizedWeight[Tensor]) -> Tensor:
    """Multiply quantized activations by a quantized weight; see `reference.int8_matmul`.

    Args:
        weight: its codes contiguous.

    Returns:
        [M, N] in the dtype of `x.outlier_x`, summed in float32 and rounded once.
    """
    return torch.ops.cuda_kernels.int8_matmul(*x[:-1], *weight, x.block_size)  # type: ignore[no-any-return]


def dequantize_epilogue(products: Tensor, x: QuantizedActivations[Tensor], weight: QuantizedWeight[Tensor]) -> Tensor:
    """Convert another library's integer products to outputs; see `reference.dequantize_epilogue`.

    Args:
        products: int32 [M, N], x.codes @ weight.codes.T.
        x, weight: as for `int8_matmul`, x with one scale a token. The values of `x.codes` are not read.
    """
    if x.block_size:
        raise ValueError(f"expected x with one scale a token, found a block size of {x.block_size}")
    return torch.ops.cuda_kernels.dequantize_epilogue(products, *x[:-1], *weight)  # type: ignore[no-any-return]


def int8_linear(
    x: Tensor,
    weight: QuantizedWeight[Tensor],
    outlier_columns: Tensor,
    threshold: float,
    capacity: int,
    block_size: int = 0,
) -> Tensor:
    """Apply a Linear layer in LLM.int8(): `activation_quantize`, then `int8_matmul`.

    Differentiable in x and bias; the weight is frozen. The gradient passes rounding straight through. It is that of
    x @ w.T with

        w[n, k] = weight.codes[n, k] * weight.absmax[n] / 127, and weight.outlier_weight[n, j] in stored column j

    so it is exact in the stored outlier columns, and adapters around and below the layer train. It holds the whole
    dequantized weight in memory during one product.

    Args:
        x: float16, bfloat16 or float32 [..., K]; copied first if its last stride is not 1, or if its tokens are not
            all one stride apart.
        weight: as for `int8_matmul`.
        outlier_columns, threshold, capacity, block_size: as for `activation_quantize`.

    Returns:
        [..., N] in the dtype of x.
    """
    rule = (outlier_columns, threshold, capacity, block_size)
    if is_plain(x, *weight, outlier_columns):
        return run_int8_linear(x, *weight, *rule)  # type: ignore[no-any-return]
    return torch.ops.cuda_kernels.int8_linear(x, *weight, *rule)  # type: ignore[no-any-return]


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether an operation on these tensors may do without torch's dispatcher, which costs 15 us a call.

    It may if all are on the CPU, in memory as they read, and nothing records, traces, transforms, watches or
    differentiates it.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or is_in_torch_dispatch_mode():
        return False
    if torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, Parameter) or tensor.device.type != "cpu" or tensor.is_neg():
            return False
        if tensor._is_zerotensor() or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
    return True
