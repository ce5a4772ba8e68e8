"""The operations as Numba CPU kernels, which are compiled once and kept on disk; see `operations` and `objects`."""

from cuda_kernels.cpu.dtypes import BITS_DTYPE
from cuda_kernels.cpu.operations import (
    activation_quantize,
    dequantize_epilogue,
    dequantize_packed,
    dequantize_reordered,
    feedback_round,
    int8_matmul,
    panels,
    rotate,
    row_quantize,
    square_products,
)

__all__ = [
    "BITS_DTYPE",
    "activation_quantize",
    "dequantize_epilogue",
    "dequantize_packed",
    "dequantize_reordered",
    "feedback_round",
    "int8_matmul",
    "panels",
    "rotate",
    "row_quantize",
    "square_products",
]
