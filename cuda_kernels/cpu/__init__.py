"""The operations as Numba CPU kernels, which release the GIL.

They read arrays and write arrays that the caller allocated. Floats are passed as their bits, see `BITS_DTYPE`. Those
that take `n_threads` start threads. The others run on the calling thread, because their callers run one per core.
"""

from cuda_kernels.cpu.activation_quantize import activation_quantize
from cuda_kernels.cpu.bits import BITS_DTYPE
from cuda_kernels.cpu.dequantize_epilogue import dequantize_epilogue
from cuda_kernels.cpu.dequantize_fp8 import dequantize_fp8
from cuda_kernels.cpu.feedback_round import feedback_round, panels, square_products
from cuda_kernels.cpu.int8_matmul import int8_matmul
from cuda_kernels.cpu.rotate import rotate
from cuda_kernels.cpu.row_quantize import row_quantize

__all__ = [
    "BITS_DTYPE",
    "activation_quantize",
    "dequantize_epilogue",
    "dequantize_fp8",
    "feedback_round",
    "int8_matmul",
    "panels",
    "rotate",
    "row_quantize",
    "square_products",
]
