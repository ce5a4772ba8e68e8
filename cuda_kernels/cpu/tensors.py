"""The CPU kernels for torch tensors: the kernels read the tensors' memory as arrays, and outputs are allocated here.

They use `torch.get_num_threads()` threads; results do not depend on it. `cuda_kernels.cpu` does not import this module,
because it needs no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cuda_kernels import cpu
from cuda_kernels.cpu.threads import run_split
from cuda_kernels.reference import QuantizedActivations, QuantizedRows, QuantizedWeight, n_blocks

_Array = npt.NDArray[Any]

_BITS = {
    torch.float16: (torch.int16, cpu.BITS_DTYPE["F16"]),
    torch.bfloat16: (torch.int16, cpu.BITS_DTYPE["BF16"]),
    torch.float32: (torch.int32, cpu.BITS_DTYPE["F32"]),
}


def _bits(tensor: Tensor) -> _Array:
    """The memory of a float tensor as bits, without a copy."""
    integer, dtype = _BITS[tensor.dtype]
    bits: _Array = tensor.detach().view(integer).numpy().view(dtype)
    return bits


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().numpy()
    return array


def row_quantize(weight: Tensor) -> QuantizedRows[Tensor]:
    n_rows = weight.shape[0]
    codes, absmax = torch.empty(weight.shape, dtype=torch.int8), torch.empty(n_rows)
    signal, noise = torch.empty(n_rows, dtype=torch.float64), torch.empty(n_rows, dtype=torch.float64)
    rows = QuantizedRows(codes, absmax, signal, noise)
    bits, arrays = _bits(weight), [_array(tensor) for tensor in rows]

    def quantize(begin: int, end: int) -> None:
        cpu.row_quantize(bits[begin:end], *(array[begin:end] for array in arrays))

    run_split(quantize, n_rows, torch.get_num_threads())
    return rows


def activation_quantize(
    x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int, block_size: int = 0
) -> QuantizedActivations[Tensor]:
    n_tokens, n_columns = x.shape
    result = QuantizedActivations(
        torch.empty(x.shape, dtype=torch.int8),
        torch.empty(n_tokens, n_blocks(n_columns, block_size)),
        x.new_empty((n_tokens, outlier_columns.shape[0])),
        torch.empty(capacity, dtype=torch.int32),
        torch.empty(1, dtype=torch.int32),
        x.new_empty((n_tokens, capacity)),
        block_size,
    )
    columns, n_threads = _array(outlier_columns.contiguous()), torch.get_num_threads()
    cpu.activation_quantize(_bits(x), columns, threshold, _activation_arrays(result), n_threads)
    return result


def int8_matmul(x: QuantizedActivations[Tensor], weight: QuantizedWeight[Tensor]) -> Tensor:
    y = x.outlier_x.new_empty((x.codes.shape[0], weight.codes.shape[0]))
    arrays = _checked(_activation_arrays(x), weight.codes.shape[1])
    cpu.int8_matmul(arrays, _weight_arrays(weight), _bits(y), torch.get_num_threads())
    return y


def dequantize_epilogue(products: Tensor, x: QuantizedActivations[Tensor], weight: QuantizedWeight[Tensor]) -> Tensor:
    y = x.outlier_x.new_empty(products.shape)
    arrays, n_threads = _checked(_activation_arrays(x), weight.codes.shape[1]), torch.get_num_threads()
    cpu.dequantize_epilogue(_array(products.contiguous()), arrays, _weight_arrays(weight), _bits(y), n_threads)
    return y


def int8_linear(
    x: Tensor,
    weight: QuantizedWeight[Tensor],
    outlier_columns: Tensor,
    threshold: float,
    capacity: int,
    block_size: int = 0,
) -> Tensor:
    """Run `ops.int8_linear` on x [M, K]. The quantized activations never become tensors."""
    (n_tokens, n_columns), n_threads = x.shape, torch.get_num_threads()
    bits = _bits(x)
    columns = _array(outlier_columns.contiguous())
    quantized = QuantizedActivations[_Array](
        np.empty((n_tokens, n_columns), np.int8),
        np.empty((n_tokens, n_blocks(n_columns, block_size)), np.float32),
        np.empty((n_tokens, columns.size), bits.dtype),
        np.empty(capacity, np.int32),
        np.empty(1, np.int32),
        np.empty((n_tokens, capacity), bits.dtype),
        block_size,
    )
    cpu.activation_quantize(bits, columns, threshold, quantized, n_threads)
    y = x.new_empty((n_tokens, weight.codes.shape[0]))
    cpu.int8_matmul(quantized, _weight_arrays(weight), _bits(y), n_threads)
    return y


def _activation_arrays(x: QuantizedActivations[Tensor]) -> QuantizedActivations[_Array]:
    return QuantizedActivations(
        _array(x.codes.contiguous()),
        _array(x.absmax.contiguous()),
        _bits(x.outlier_x.contiguous()),
        _array(x.found_columns.contiguous()),
        _array(x.n_found),
        _bits(x.found_x.contiguous()),
        x.block_size,
    )


def _weight_arrays(weight: QuantizedWeight[Tensor]) -> QuantizedWeight[_Array]:
    bias = None if weight.bias is None else _bits(weight.bias.contiguous())
    side_weight, absmax = _bits(weight.outlier_weight.contiguous()), _array(weight.absmax.contiguous())
    return QuantizedWeight(_array(weight.codes), absmax, side_weight, bias)


def _checked(x: QuantizedActivations[_Array], n_columns: int) -> QuantizedActivations[_Array]:
    """Refuse found columns that a kernel would read outside the weight."""
    n_found = int(x.n_found[0])
    taken = x.found_columns[: max(n_found, 0)]
    if n_found < 0 or ((taken < 0) | (taken >= n_columns)).any():
        raise ValueError(f"expected found columns below {n_columns}, found {taken.tolist()}, n_found {n_found}")
    return x
