"""The decomposed int8 product on the GPU: the choice of a kernel, and the torch wrapper; see `reference.int8_matmul`.

| tokens | products by | epilogue |
|---|---|---|
| up to 8 | `int8_gemv`: dp4a | fused |
| up to 64 | `int8_skinny`: tensor cores (sm_80; before that, `int8_gemv`, 8 tokens at a time) | fused |
| more | `torch._int_mm`: cuBLASLt | `dequantize_epilogue` |

Activations with a scale for each block of columns are all multiplied by `int8_blocks`.

cuBLASLt needs multiples of 8 columns and features, and addresses that are multiples of 16. For other weights the skinny
product takes the tokens 64 at a time. Weights are never copied. All three end in the same arithmetic, so a token's
output does not depend on the size of its batch.

Left out on purpose: a matmul of many tokens with a fused epilogue. It would save a pass over 4 M N bytes of products,
which nobody has measured yet.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from cuda_kernels.cuda import dequantize_epilogue, int8_blocks, int8_gemv, int8_skinny
from cuda_kernels.cuda.int8_operands import Operands, contiguous, of_tensors
from cuda_kernels.cuda.launch import run
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

if TYPE_CHECKING:
    import torch

MOST_GEMV_TOKENS = 8
MOST_SKINNY_TOKENS = 64


class Engine(Enum):
    """The implementation that computes the integer products."""

    GEMV = "int8_gemv"
    SKINNY = "int8_skinny"
    LIBRARY = "torch._int_mm"
    BLOCKS = "int8_blocks"


def choose(operands: Operands, capability: tuple[int, int]) -> Engine:
    """The engine for these operands on a device of this compute capability."""
    o = operands
    if o.x.block_size:
        return Engine.BLOCKS
    if o.n_tokens <= MOST_GEMV_TOKENS:
        return Engine.GEMV
    fits_library = o.n_columns > 0 and (o.n_columns | o.n_features) % 8 == 0 and (o.x.codes | o.weight.codes) % 16 == 0
    if o.n_tokens > MOST_SKINNY_TOKENS and fits_library:
        return Engine.LIBRARY
    return Engine.SKINNY if capability >= int8_skinny.LEAST_CAPABILITY else Engine.GEMV


def int8_matmul(x: QuantizedActivations[torch.Tensor], weight: QuantizedWeight[torch.Tensor]) -> torch.Tensor:
    """Multiply quantized activations by a quantized weight; `ops` describes and checks the tensors.

    Queued on torch's current stream without waiting. A CUDA graph can capture it once a first call has loaded its
    kernels. Contiguous tensors are not copied.
    """
    import torch

    x, weight = contiguous(x, weight)
    y = x.outlier_x.new_empty((len(x.codes), len(weight.codes)))
    if not y.numel():
        return y
    operands = of_tensors(x, weight, y)
    capability = torch.cuda.get_device_capability(y.device)
    engine = choose(operands, capability)
    if engine is Engine.BLOCKS:
        run(int8_blocks.launches(operands, capability), y.device)
    elif engine is Engine.LIBRARY:
        products = torch._int_mm(x.codes, weight.codes.t())
        run(dequantize_epilogue.launches(operands, products.data_ptr()), y.device)
    else:
        run((int8_gemv if engine is Engine.GEMV else int8_skinny).launches(operands), y.device)
    return y
