"""The CPU kernels for torch tensors: their memory is lent to the kernels as arrays, outputs are made here.

As many threads as `torch.get_num_threads()` says; results do not depend on it. Not imported with the package beside it,
which does without torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cuda_kernels import cpu
from cuda_kernels.cpu.threads import run_split

_Array = npt.NDArray[Any]

_BITS = {
    torch.float16: (torch.int16, cpu.BITS_DTYPE["F16"]),
    torch.bfloat16: (torch.int16, cpu.BITS_DTYPE["BF16"]),
    torch.float32: (torch.int32, cpu.BITS_DTYPE["F32"]),
}


def _bits(tensor: Tensor) -> _Array:
    """The memory of a float tensor as the kernels take it; no copy."""
    integer, dtype = _BITS[tensor.dtype]
    bits: _Array = tensor.detach().view(integer).numpy().view(dtype)
    return bits


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().numpy()
    return array


def row_quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.row_quantize`."""
    n_rows = weight.shape[0]
    codes, absmax = torch.empty(weight.shape, dtype=torch.int8), torch.empty(n_rows)
    signal, noise = torch.empty(n_rows, dtype=torch.float64), torch.empty(n_rows, dtype=torch.float64)
    bits, arrays = _bits(weight), [_array(t) for t in (codes, absmax, signal, noise)]

    def quantize(begin: int, end: int) -> None:
        cpu.row_quantize(bits[begin:end], *(array[begin:end] for array in arrays))

    run_split(quantize, n_rows, torch.get_num_threads())
    return codes, absmax, signal, noise


def activation_quantize(
    x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.activation_quantize`."""
    n_tokens = x.shape[0]
    codes, absmax = torch.empty(x.shape, dtype=torch.int8), torch.empty(n_tokens)
    outlier_x, found_x = x.new_empty((n_tokens, outlier_columns.shape[0])), x.new_empty((n_tokens, capacity))
    found_columns, n_found = torch.empty(capacity, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    cpu.activation_quantize(
        _bits(x),
        _array(outlier_columns.contiguous()),
        threshold,
        _array(codes),
        _array(absmax),
        _bits(outlier_x),
        _array(found_columns),
        _array(n_found),
        _bits(found_x),
        n_threads=torch.get_num_threads(),
    )
    return codes, absmax, outlier_x, found_columns, n_found, found_x


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
    """See `ops.int8_matmul`."""
    x = _side_arrays(x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes.shape[1])
    weight = _weight_arrays(weight_codes, weight_absmax, outlier_weight, bias)
    y = outlier_x.new_empty((codes.shape[0], weight_codes.shape[0]))
    cpu.int8_matmul(_array(codes.contiguous()), *x, *weight, _bits(y), n_threads=torch.get_num_threads())
    return y


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
    """See `ops.dequantize_epilogue`."""
    x = _side_arrays(x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes.shape[1])
    weight = _weight_arrays(weight_codes, weight_absmax, outlier_weight, bias)
    y = outlier_x.new_empty(products.shape)
    cpu.dequantize_epilogue(_array(products.contiguous()), *x, *weight, _bits(y), n_threads=torch.get_num_threads())
    return y


def _side_arrays(
    x_absmax: Tensor, outlier_x: Tensor, found_columns: Tensor, n_found: Tensor, found_x: Tensor, n_columns: int
) -> tuple[_Array, _Array, _Array, _Array, _Array]:
    columns, count = _array(found_columns.contiguous()), _array(n_found)
    taken = columns[: max(int(count[0]), 0)]
    if count[0] < 0 or ((taken < 0) | (taken >= n_columns)).any():
        raise ValueError(f"expected found columns below {n_columns}, found {taken.tolist()}, n_found {int(count[0])}")
    return _array(x_absmax.contiguous()), _bits(outlier_x.contiguous()), columns, count, _bits(found_x.contiguous())


def _weight_arrays(
    weight_codes: Tensor, weight_absmax: Tensor, outlier_weight: Tensor, bias: Tensor | None
) -> tuple[_Array, _Array, _Array, _Array | None]:
    side_weight, absmax = _bits(outlier_weight.contiguous()), _array(weight_absmax.contiguous())
    return _array(weight_codes), absmax, side_weight, None if bias is None else _bits(bias.contiguous())


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
    """See `ops.int8_linear`; x is [M, K]. What lies between the two operations never becomes a tensor."""
    (n_tokens, n_columns), n_threads = x.shape, torch.get_num_threads()
    bits = _bits(x)
    columns = _array(outlier_columns.contiguous())
    quantized = (
        np.empty((n_tokens, n_columns), np.int8),
        np.empty(n_tokens, np.float32),
        np.empty((n_tokens, columns.size), bits.dtype),
        np.empty(capacity, np.int32),
        np.empty(1, np.int32),
        np.empty((n_tokens, capacity), bits.dtype),
    )
    cpu.activation_quantize(bits, columns, threshold, *quantized, n_threads=n_threads)
    y = x.new_empty((n_tokens, weight_codes.shape[0]))
    weight = _weight_arrays(weight_codes, weight_absmax, outlier_weight, bias)
    cpu.int8_matmul(*quantized, *weight, _bits(y), n_threads=n_threads)
    return y
