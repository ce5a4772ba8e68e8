"""The operands of an int8 product as the kernels take them: addresses and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from numba.cuda import types

from cuda_kernels.cuda.ptx.products import VECTOR
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

if TYPE_CHECKING:
    import torch

POINTER = {
    "F16": types.CPointer(types.uint16),
    "BF16": types.CPointer(types.int16),
    "F32": types.CPointer(types.uint32),
}
"""The pointer type of each dtype in a kernel: the integer type of its bits names the format."""


class Operands(NamedTuple):
    """Addresses and sizes of a product; shapes, dtypes and meaning as in `reference.int8_matmul`, arrays contiguous.

    dtype: "F16", "BF16" or "F32", of outlier_x, found_x, outlier_weight, bias and y.
    x: `x.codes` is not read where the products exist already.
    weight: `weight.bias` is 0 for none.
    """

    dtype: str
    x: QuantizedActivations[int]
    weight: QuantizedWeight[int]
    y: int
    n_tokens: int
    n_features: int
    n_columns: int
    n_outliers: int
    capacity: int

    @property
    def is_aligned(self) -> bool:
        """Whether both matrices of codes can be loaded 16 bytes at a time."""
        return (self.x.codes | self.weight.codes | self.n_columns) % VECTOR == 0


def epilogue_types(dtype: str) -> tuple[Any, ...]:
    """The types of a kernel's last arguments, from x_absmax on."""
    values, floats, columns = POINTER[dtype], types.CPointer(types.float32), types.CPointer(types.int32)
    pointers = (floats, values, columns, columns, values, types.CPointer(types.int8), floats, values, values, values)
    return (*pointers, types.uint32, *[types.int64] * 5)


def epilogue_arguments(o: Operands) -> tuple[int, ...]:
    """A kernel's last arguments, in the order of `epilogue_types`; before the sizes, whether there is a bias."""
    sizes = (o.n_tokens, o.n_features, o.n_columns, o.n_outliers, o.capacity)
    bias = o.weight.bias or 0
    return (*o.x[1:6], *o.weight[:3], bias, o.y, int(bias != 0), *sizes)


def contiguous(
    x: QuantizedActivations[torch.Tensor], weight: QuantizedWeight[torch.Tensor]
) -> tuple[QuantizedActivations[torch.Tensor], QuantizedWeight[torch.Tensor]]:
    """Both with every tensor contiguous, copied where it was not."""
    codes, absmax, outlier_weight = (tensor.contiguous() for tensor in weight[:3])
    bias = weight.bias if weight.bias is None else weight.bias.contiguous()
    return (
        QuantizedActivations._make((*(tensor.contiguous() for tensor in x[:6]), x.block_size)),
        QuantizedWeight(codes, absmax, outlier_weight, bias),
    )


def of_tensors(
    x: QuantizedActivations[torch.Tensor], weight: QuantizedWeight[torch.Tensor], y: torch.Tensor
) -> Operands:
    """The operands of these tensors, which are contiguous, on one device, and of fitting shapes."""
    sizes = (*y.shape, weight.codes.shape[1], weight.outlier_weight.shape[1], x.found_columns.shape[0])
    placed_x: QuantizedActivations[int] = QuantizedActivations._make(
        (*(tensor.data_ptr() for tensor in x[:6]), x.block_size)
    )
    placed_weight = QuantizedWeight(*(0 if tensor is None else tensor.data_ptr() for tensor in weight))
    return Operands(format_of(y), placed_x, placed_weight, y.data_ptr(), *sizes)


def format_of(values: torch.Tensor) -> str:
    """The name of a tensor's dtype in safetensors: "F16", "BF16" or "F32"."""
    import torch

    return {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[values.dtype]
