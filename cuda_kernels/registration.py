"""Each operator's registration with torch: its schema, its devices, its traced outputs, and its gradient.

Importing this module registers the namespace `cuda_kernels`. Callers use `ops`, which imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cuda_kernels.operands import check_floats, check_layer, check_product, check_rule
from cuda_kernels.reference import N_STEPS, QuantizedActivations, QuantizedWeight, n_blocks

# The fields of `QuantizedActivations` and `QuantizedWeight`: a schema knows no tuples of tensors with names. torch does
# not pass on an argument that equals its default, so the functions below may get no block size.
_X = "Tensor codes, Tensor absmax, Tensor outlier_x, Tensor found_columns, Tensor n_found, Tensor found_x"
_WEIGHT = "Tensor weight_codes, Tensor weight_absmax, Tensor outlier_weight, Tensor? bias"
_RULE = "Tensor outlier_columns, float threshold, int capacity, int block_size=0"


@cache
def _kernel(operation: str, device: str) -> Callable[..., Any]:
    """The function of tensors that runs an operation, imported on its first use on a device."""
    module = import_module("cuda_kernels.cpu.tensors" if device == "cpu" else f"cuda_kernels.cuda.{operation}")
    function: Callable[..., Any] = getattr(module, operation)
    return function


def _side_by_side(matrix: Tensor) -> Tensor:
    """The matrix itself if its last stride is 1, as all kernels need it; else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _run_row_quantize(weight: Tensor) -> Any:
    check_floats("weight", weight, 2)
    return _kernel("row_quantize", weight.device.type)(_side_by_side(weight))


def _trace_row_quantize(weight: Tensor) -> Any:
    check_floats("weight", weight, 2)
    n_rows = weight.shape[0]
    dtypes = (torch.float32, torch.float64, torch.float64)
    return weight.new_empty(weight.shape, dtype=torch.int8), *(weight.new_empty(n_rows, dtype=d) for d in dtypes)


def _run_activation_quantize(x: Tensor, outlier_columns: Tensor, *rule: Any) -> Any:
    check_floats("x", x, 2)
    check_rule(x, outlier_columns, *rule)
    return _kernel("activation_quantize", x.device.type)(_side_by_side(x), outlier_columns, *rule)[:-1]


def _trace_activation_quantize(
    x: Tensor, outlier_columns: Tensor, threshold: float, capacity: int, block_size: int = 0
) -> Any:
    check_floats("x", x, 2)
    check_rule(x, outlier_columns, threshold, capacity, block_size)
    n_tokens, n_columns = x.shape
    absmax = x.new_empty(n_tokens, n_blocks(n_columns, block_size), dtype=torch.float32)
    outlier_x, found_x = x.new_empty(n_tokens, outlier_columns.shape[0]), x.new_empty(n_tokens, capacity)
    found_columns, n_found = outlier_columns.new_empty(capacity), outlier_columns.new_empty(1)
    return x.new_empty(x.shape, dtype=torch.int8), absmax, outlier_x, found_columns, n_found, found_x


def _parts(operands: tuple[Any, ...]) -> tuple[QuantizedActivations[Tensor], QuantizedWeight[Tensor]]:
    return QuantizedActivations(*operands[:6], *operands[10:]), QuantizedWeight(*operands[6:10])


def _run_int8_matmul(*operands: Any) -> Any:
    x, weight = _parts(operands)
    check_product(x, weight)
    return _kernel("int8_matmul", x.codes.device.type)(x, weight)


def _trace_int8_matmul(*operands: Any) -> Any:
    x, weight = _parts(operands)
    check_product(x, weight)
    return x.outlier_x.new_empty(x.codes.shape[0], weight.codes.shape[0])


def _run_dequantize_epilogue(products: Tensor, *operands: Any) -> Any:
    x, weight = _parts(operands)
    check_product(x, weight, products)
    return _kernel("dequantize_epilogue", products.device.type)(products, x, weight)


def _trace_dequantize_epilogue(products: Tensor, *operands: Any) -> Any:
    x, weight = _parts(operands)
    check_product(x, weight, products)
    return x.outlier_x.new_empty(products.shape)


def run_int8_linear(x: Tensor, *operands: Any) -> Any:
    weight, rule, device = QuantizedWeight(*operands[:4]), operands[4:], x.device.type
    check_layer(x, weight, *rule)
    tokens = _side_by_side(x.flatten(0, -2) if x.dim() > 1 else x[None])
    if device == "cpu":
        y = _kernel("int8_linear", device)(tokens, weight, *rule)
    else:
        y = _kernel("int8_matmul", device)(_kernel("activation_quantize", device)(tokens, *rule), weight)
    return y.view(*x.shape[:-1], weight.codes.shape[0])


def _trace_int8_linear(x: Tensor, *operands: Any) -> Any:
    weight = QuantizedWeight(*operands[:4])
    check_layer(x, weight, *operands[4:])
    return x.new_empty(*x.shape[:-1], weight.codes.shape[0])


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, torch names it
    _x, weight_codes, weight_absmax, outlier_weight, _bias, outlier_columns, *_ = inputs
    ctx.save_for_backward(weight_codes, weight_absmax, outlier_weight, outlier_columns)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    weight_codes, weight_absmax, outlier_weight, outlier_columns = ctx.saved_tensors
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    grad_x = grad_bias = None
    if needs_x:
        weight = (weight_codes * (weight_absmax / N_STEPS)[:, None]).to(grad_y.dtype)
        grad_x = grad_y @ weight.index_copy(1, outlier_columns.long(), outlier_weight)
    if needs_bias:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None, None


def _register(name: str, schema: str, run: Callable[..., Any], trace: Callable[..., Any]) -> None:
    operator = f"cuda_kernels::{name}"
    # Not `custom_op`, with which torch's share of a call is about 20 us instead of 7.
    torch.library.define(operator, schema)
    torch.library.impl(operator, ("cpu", "cuda"), run)
    torch.library.register_fake(operator, trace)


_register(
    "row_quantize",
    "(Tensor weight) -> (Tensor codes, Tensor absmax, Tensor signal, Tensor noise)",
    _run_row_quantize,
    _trace_row_quantize,
)
_register(
    "activation_quantize",
    f"(Tensor x, {_RULE}) -> ({_X})",
    _run_activation_quantize,
    _trace_activation_quantize,
)
_register(
    "int8_matmul",
    f"({_X}, {_WEIGHT}, int block_size=0) -> Tensor",
    _run_int8_matmul,
    _trace_int8_matmul,
)
_register(
    "dequantize_epilogue",
    f"(Tensor products, {_X}, {_WEIGHT}) -> Tensor",
    _run_dequantize_epilogue,
    _trace_dequantize_epilogue,
)
_register("int8_linear", f"(Tensor x, {_WEIGHT}, {_RULE}) -> Tensor", run_int8_linear, _trace_int8_linear)
torch.library.register_autograd("cuda_kernels::int8_linear", _differentiate, setup_context=_keep_for_gradient)
