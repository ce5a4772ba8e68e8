"""The CPU kernels for torch tensors: the kernels read the tensors' memory as arrays, and outputs are allocated here.

They use `torch.get_num_threads()` threads; results do not depend on it. `cuda_kernels.cpu` does not import this module,
because it needs no torch.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cuda_kernels import cpu
from cuda_kernels.cpu.dtypes import Kind
from cuda_kernels.cpu.objects import Kernel
from cuda_kernels.cpu.operations import check
from cuda_kernels.cpu.team import ALONE, team
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


_INT8_LINEAR = Kernel("int8_linear", "int8_linear")
_KINDS: tuple[Kind, ...] = (("q",) * 3, "q", "q", ("q",) * 2, "f", "q", "q", ("q",) * 4, "q", "q", ("q",) * 4)
"""The types of the arguments of `kernels.int8_linear`, but for the last one, which has that of the floats' bits."""

_MIN_CODES = 1 << 19
"""Codes of a weight that pay for a thread of Python's."""


@cache
def _entry(dtype: torch.dtype) -> Any:
    return _INT8_LINEAR.entry((*_KINDS, str(_BITS[dtype][1].str)))


def int8_linear(
    x: Tensor,
    weight: QuantizedWeight[Tensor],
    outlier_columns: Tensor,
    threshold: float,
    capacity: int,
    block_size: int = 0,
) -> Tensor:
    """Run `ops.int8_linear` on x [M, K]. All of the work is one call, which costs a few microseconds."""
    (n_tokens, n_columns), n_rows = x.shape, weight.codes.shape[0]
    y = x.new_empty((n_tokens, n_rows))
    if not n_tokens or not n_rows:
        return y
    entry, n_threads, item = _entry(x.dtype), torch.get_num_threads(), x.element_size()
    columns, bias, row_stride = outlier_columns.contiguous(), weight.bias, x.stride(0)
    absmax, side_weight = weight.absmax.contiguous(), weight.outlier_weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    n_stored, threads = columns.shape[0], team(n_threads)
    rule = (columns.data_ptr(), n_stored, threshold, capacity, block_size or n_columns)
    x_at, codes_at, absmax_at, y_at = x.data_ptr(), weight.codes.data_ptr(), absmax.data_ptr(), y.data_ptr()
    side_at, bias_at = side_weight.data_ptr(), 0 if bias is None else bias.data_ptr()

    def multiply(begin: int, end: int) -> None:
        result = (ctypes.c_int64 * 2)()
        weight_at = (codes_at + begin * n_columns, absmax_at + 4 * begin, side_at + begin * n_stored * item)
        entry(
            *(result, result, n_tokens, end - begin, n_columns, x_at, row_stride, *rule),
            *(*weight_at, bias_at and bias_at + begin * item, y_at + begin * item, n_rows, *threads, 0),
        )
        check(result[0], columns, n_columns)

    if threads != ALONE or n_threads == 1:
        multiply(0, n_rows)
    else:
        run_split(multiply, n_rows, min(n_threads, n_rows * n_columns // _MIN_CODES + 1), 32)
    return y


_FLOAT_LINEAR = Kernel("float_linear", "float_linear")


@cache
def _float_entry(dtype: torch.dtype) -> Any:
    return _FLOAT_LINEAR.entry((("q",) * 3, "q", "q", "q", "q", ("q",) * 4, str(_BITS[dtype][1].str)))


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a Linear layer of floats of 16 bits to few tokens, at the speed of memory; see `kernels.float_linear`.

    Args:
        x: float16 or bfloat16 [M, K].
        weight, bias: [N, K], contiguous, and [N], of the same dtype.
    """
    (n_tokens, n_columns), n_rows = x.shape, weight.shape[0]
    y = x.new_empty((n_tokens, n_rows))
    if not n_tokens or not n_rows:
        return y
    x, bias, result = x.contiguous(), None if bias is None else bias.contiguous(), (ctypes.c_int64 * 2)()
    addresses = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    threads = team(torch.get_num_threads())
    _float_entry(x.dtype)(result, result, n_tokens, n_rows, n_columns, *addresses, *threads, 0)
    check(result[0], None, n_columns)
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
