"""Integer products to outputs on the GPU, in one pass over them: scales, outlier terms, bias.

The formula and the order of its roundings are those of `epilogue`, in which the fused products end, too. A block takes
a tile of tokens and features. It loads products 16 bytes at a time, four loads before the first use, and stores outputs
8 bytes at a time (16 of fp32); the 256 bytes of a warp are contiguous.

Bytes moved: 4 M N in, 2 M N out (4 of fp32), and the outlier weights, 2 N n, once for each `TILE_TOKENS` tokens, from
L2. Floor on an H200 at 4.3 TB/s: M = 8192, N = 9216, fp16: 453 MB, 105 us. Not yet measured on a GPU.

It does not check that absmax is finite: infinity gives NaN.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda.epilogue import make_epilogue
from cuda_kernels.cuda.int8_operands import Operands, contiguous, epilogue_arguments, epilogue_types, of_tensors
from cuda_kernels.cuda.launch import Kernel, Launch, run
from cuda_kernels.cuda.ptx import tiles as tile
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight

if TYPE_CHECKING:
    import torch

THREADS = 256
TILE_TOKENS, TILE_FEATURES = 32, 128
BLOCKS = 2
"""The fewest blocks that a multiprocessor must hold, which bounds the registers."""


@cuda.jit(device=True, inline="always")
def _read_products(products, t, f, first_token, first_feature, M, N):  # type: ignore[no-untyped-def]
    last, token, feature = M - 1, first_token + t, first_feature + f
    r0, r1 = token * N, min(token + 1, last) * N
    r2, r3 = min(token + 2, last) * N, min(token + 3, last) * N
    if N % 4 == 0:
        p0, p1 = tile.load4(products, r0 + feature), tile.load4(products, r1 + feature)
        p2, p3 = tile.load4(products, r2 + feature), tile.load4(products, r3 + feature)
    else:
        end = N - 1
        p0 = tile.load4_clamped(products, r0 + feature, r0 + end)
        p1 = tile.load4_clamped(products, r1 + feature, r1 + end)
        p2 = tile.load4_clamped(products, r2 + feature, r2 + end)
        p3 = tile.load4_clamped(products, r3 + feature, r3 + end)
    return p0 + p1 + p2 + p3


@cache
def _kernel(dtype: str, tile_tokens: int, tile_features: int) -> Kernel:
    epilogue = make_epilogue(tile_tokens, tile_features, THREADS, _read_products)

    def dequantize_epilogue(  # type: ignore[no-untyped-def]
        products, x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight,
        bias, y, has_bias, M, N, K, n, capacity,
    ):  # fmt: skip
        # products int32 [M, N]; y [M, N]; the rest as in `Operands`. Grid: tiles of features x tiles of tokens.
        first_feature = cuda.blockIdx.x * tile_features
        first_token = cuda.blockIdx.y * tile_tokens
        terms = (outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
        sizes = (M, N, K, n, capacity)
        epilogue(products, first_token, first_feature, x_absmax, terms, bias, has_bias, y, sizes)

    return Kernel(dequantize_epilogue, (types.CPointer(types.int32), *epilogue_types(dtype)), THREADS, BLOCKS)


def launches(
    operands: Operands, products: int, tile_tokens: int = TILE_TOKENS, tile_features: int = TILE_FEATURES
) -> list[Launch]:
    """Plan one launch; `products` is the address of int32 [M, N], aligned to 16 bytes as `operands.y` is."""
    grid = (-(-operands.n_features // tile_features), -(-operands.n_tokens // tile_tokens), 1)
    kernel = _kernel(operands.dtype, tile_tokens, tile_features)
    return [Launch(kernel, grid, 0, (products, *epilogue_arguments(operands)))]


def dequantize_epilogue(
    products: torch.Tensor, x: QuantizedActivations[torch.Tensor], weight: QuantizedWeight[torch.Tensor]
) -> torch.Tensor:
    """Convert integer products to outputs; `ops` describes and checks the tensors.

    Queued on torch's current stream without waiting.
    """
    products = products.contiguous()
    y = x.outlier_x.new_empty(products.shape)
    if y.numel():
        x, weight = contiguous(x, weight)
        run(launches(of_tensors(x, weight, y), products.data_ptr()), y.device)
    return y
