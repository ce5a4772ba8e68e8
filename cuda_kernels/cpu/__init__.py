"""The operations as Numba CPU kernels, none of which holds Python's lock.

Arrays in, arrays the caller owns out; floats as their bits, see `BITS_DTYPE`.

Numba's own threads are left out on purpose: its default threading layer may not be entered by two threads at once, and
the callers have threads of their own.
"""

from cuda_kernels.cpu.bits import BITS_DTYPE
from cuda_kernels.cpu.dequantize_fp8 import dequantize_fp8
from cuda_kernels.cpu.row_quantize import row_quantize

__all__ = ["BITS_DTYPE", "dequantize_fp8", "row_quantize"]
