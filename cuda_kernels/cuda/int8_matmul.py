"""The decomposed int8 product on the GPU; the meaning is `reference.int8_matmul`. Which kernel, and the torch wrapper.

| tokens | products by | epilogue |
|---|---|---|
| up to 8 | `int8_gemv`: dp4a | fused |
| up to 64 | `int8_skinny`: tensor cores (sm_80; before that, `int8_gemv`, 8 tokens at a time) | fused |
| more | `torch._int_mm`: cuBLASLt | `dequantize_epilogue` |

cuBLASLt wants multiples of 8 columns and features, and addresses of whole vectors; where a weight has others, the
skinny product takes its tokens 64 at a time. Weights are never copied. All three end in the same arithmetic, so a
token's output does not depend on how many stand beside it.

Left out on purpose: a matmul of many tokens with a fused epilogue, which would save the pass over 4 M N bytes of
products, until it can be measured.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from cuda_kernels.cuda import dequantize_epilogue, int8_gemv, int8_operands, int8_skinny
from cuda_kernels.cuda.int8_operands import Operands
from cuda_kernels.cuda.launch import run

if TYPE_CHECKING:
    import torch

MOST_GEMV_TOKENS = 8
MOST_SKINNY_TOKENS = 64


class Engine(Enum):
    """Who multiplies."""

    GEMV = "int8_gemv"
    SKINNY = "int8_skinny"
    LIBRARY = "torch._int_mm"


def choose(operands: Operands, capability: tuple[int, int]) -> Engine:
    """The engine for these operands on a device of this compute capability."""
    o = operands
    if o.n_tokens <= MOST_GEMV_TOKENS:
        return Engine.GEMV
    fits_library = o.n_columns > 0 and (o.n_columns | o.n_features) % 8 == 0 and (o.codes | o.weight_codes) % 16 == 0
    if o.n_tokens > MOST_SKINNY_TOKENS and fits_library:
        return Engine.LIBRARY
    return Engine.SKINNY if capability >= int8_skinny.LEAST_CAPABILITY else Engine.GEMV


def int8_matmul(
    codes: torch.Tensor,
    x_absmax: torch.Tensor,
    outlier_x: torch.Tensor,
    found_columns: torch.Tensor,
    n_found: torch.Tensor,
    found_x: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_absmax: torch.Tensor,
    outlier_weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Quantized activations times a quantized weight; `ops` says what the tensors are, and checks them.

    Queued on torch's current stream, without waiting for anything; can be captured in a CUDA graph once a first call
    has loaded its kernels. Weights are not copied, nor is anything else that is contiguous.
    """
    import torch

    terms = (x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
    codes, *contiguous = (each.contiguous() for each in (codes, *terms))
    bias = bias if bias is None else bias.contiguous()
    y = outlier_x.new_empty((len(codes), len(weight_codes)))
    if not y.numel():
        return y
    operands = int8_operands.of_tensors(codes, contiguous, bias, y)
    engine = choose(operands, torch.cuda.get_device_capability(y.device))
    if engine is Engine.LIBRARY:
        products = torch._int_mm(codes, weight_codes.t())
        run(dequantize_epilogue.launches(operands, products.data_ptr()), y.device)
    else:
        run((int8_gemv if engine is Engine.GEMV else int8_skinny).launches(operands), y.device)
    return y
