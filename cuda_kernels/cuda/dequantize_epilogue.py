"""Integer products to outputs on the GPU, in one pass over them: scales, outlier terms, bias.

The formula, and the order of its roundings, is that of `epilogue`, which the fused products end in, too. A block takes
a tile of tokens and features; products come in 16 bytes a load, four loads before the first use, and outputs go in 8
bytes (16 of fp32): a warp's 256 are contiguous.

Bytes moved: 4 M N in, 2 M N out (4 of fp32), and the outlier weights, 2 N n, once for each `TILE_TOKENS` tokens, from
L2. Floor on an H200 at 4.3 TB/s: M = 8192, N = 9216, fp16: 453 MB, 105 us. Not yet measured on a GPU.

Does not know where the products came from, nor whether absmax is finite: infinity gives NaN.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from numba import cuda
from numba.cuda import types

from cuda_kernels.cuda import int8_operands
from cuda_kernels.cuda.epilogue import make_epilogue
from cuda_kernels.cuda.int8_operands import Operands, epilogue_arguments, epilogue_types
from cuda_kernels.cuda.launch import Kernel, Launch, run
from cuda_kernels.cuda.ptx import tiles as tile

if TYPE_CHECKING:
    import torch

THREADS = 256
TILE_TOKENS, TILE_FEATURES = 32, 128
BLOCKS = 2
"""A multiprocessor holds at least so many: bounds the registers."""


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
    """One launch; `products` is the address of int32 [M, N], aligned to 16 bytes as `operands.y` is."""
    grid = (-(-operands.n_features // tile_features), -(-operands.n_tokens // tile_tokens), 1)
    kernel = _kernel(operands.dtype, tile_tokens, tile_features)
    return [Launch(kernel, grid, 0, (products, *epilogue_arguments(operands)))]


def dequantize_epilogue(
    products: torch.Tensor,
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
    """Integer products to outputs; `ops` says what the tensors are, and checks them.

    Queued on torch's current stream, without waiting for anything.
    """
    terms = (x_absmax, outlier_x, found_columns, n_found, found_x, weight_codes, weight_absmax, outlier_weight)
    products, *contiguous = (each.contiguous() for each in (products, *terms))
    bias = bias if bias is None else bias.contiguous()
    y = outlier_x.new_empty(products.shape)
    if y.numel():
        operands = int8_operands.of_tensors(None, contiguous, bias, y)
        run(launches(operands, products.data_ptr()), y.device)
    return y
