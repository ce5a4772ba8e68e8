"""Tokens to int8 codes on the GPU, their outlier columns set aside; see `reference.activation_quantize`.

    absmax[t, b] = max_k |x[t, k]|                     over the columns of block b except outlier columns
    inv_scale    = fl32(fl32(1 / absmax[t, b]) * 127)  0 if that is not finite
    codes[t, k]  = rint(fl32(x[t, k] * inv_scale))     ties to even; 0 in outlier columns

1. A block takes a token, or several in turn if there are more than the device holds.
2. It keeps one bit for each column, in K / 8 bytes of shared memory: whether it is an outlier column; see
   `outlier_columns`.
3. A thread takes 8 adjacent columns at a time. If the whole token is one block of columns, it is read twice, the second
   time from the L1 cache. Smaller blocks are parts of a warp: their maxima stay in registers, and x is read once.

There is one launch, or two if outlier columns of more than `own_tokens` tokens must be found. Nothing waits for the
device, and no state remains between calls: a graph can capture the launches, and they give the same bits each time.

Bytes moved: M K of x (2 bytes, or 4) and M K codes, and x once more to find columns of many tokens. Floor on an H200 at
4.3 TB/s: M = 8192, K = 9216, fp16: 226 MB, 53 us, 88 with finding; for a few tokens, the latency of the launch. Not yet
measured on a GPU.

Each value is loaded alone if columns are not a multiple of 8, or addresses and row strides not of 16 bytes: correct,
and slow. Non-finite values in int8 columns show in `absmax`, and the block's codes are then 0.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types
from numpy import float32, uint32

from cuda_kernels.cuda.int8_operands import POINTER, format_of
from cuda_kernels.cuda.launch import Kernel, Launch, run
from cuda_kernels.cuda.outlier_columns import MARK_THREADS, make_take_found, make_take_stored, mark_kernel
from cuda_kernels.cuda.ptx import groups as group
from cuda_kernels.cuda.ptx.groups import GROUP
from cuda_kernels.cuda.ptx.scalars import bits_as_float, multiply_rn, reciprocal_rn, shuffle_xor, store_8_bytes
from cuda_kernels.cuda.reductions import block_max
from cuda_kernels.reference import N_STEPS, QuantizedActivations, n_blocks

if TYPE_CHECKING:
    import torch

THREADS_HELD = 1024
"""The fewest threads that a multiprocessor must hold, with 64 registers each."""

_INFINITY = float32(np.inf)
_device = cuda.jit(device=True, inline="always")


class Operands(NamedTuple):
    """Addresses and sizes; shapes and dtypes as in `reference.activation_quantize`.

    row_stride: from one row of x to the next, in elements. marks: `mark_bytes` bytes of scratch.
    """

    dtype: str
    x: int
    outlier_columns: int
    marks: int
    result: QuantizedActivations[int]
    threshold: float
    n_tokens: int
    n_columns: int
    row_stride: int
    n_outliers: int
    capacity: int


class Plan(NamedTuple):
    """The sizes that cut the work into blocks.

    threads, tokens: of a block. own_tokens: the most tokens for which every block finds the outlier columns itself.
    mark_tokens: tokens of a block of the launch that finds them for more.
    """

    threads: int
    tokens: int
    own_tokens: int
    mark_tokens: int


def plan(n_tokens: int, n_columns: int) -> Plan:
    """Choose, for few tokens, a thread for each group, and for many, one wave of blocks. A guess, not yet measured."""
    n_groups, multiprocessors = -(-n_columns // GROUP), 132
    is_few = n_tokens <= multiprocessors
    threads = next((t for t in (64, 256) if n_groups <= (t if is_few else 4 * t)), 1024 if is_few else 256)
    tokens = max(1, -(-n_tokens // (multiprocessors * (THREADS_HELD // threads))))
    return Plan(threads, tokens, own_tokens=8, mark_tokens=max(16, -(-n_tokens // 64)))


@_device
def _inverse_scale(largest):  # type: ignore[no-untyped-def]
    inv_scale = multiply_rn(reciprocal_rn(largest), float32(N_STEPS))
    return inv_scale if inv_scale < _INFINITY else float32(0)


def _make_store_codes(is_aligned: bool) -> Any:
    @_device
    def store_codes(codes, token, g, K, values, inv_scale):  # type: ignore[no-untyped-def]
        if inv_scale == float32(0):  # Infinity times 0 would give codes other than 0.
            values = group.clear(values, uint32(0xFF))
        words, at = group.quantize(values, inv_scale), token * K + g * GROUP
        if is_aligned:
            store_8_bytes(codes, at, words[0], words[1])
        else:
            group.store_codes_before(codes, at, (token + 1) * K, words)

    return store_codes


def _make_quantize_token(is_aligned: bool, threads: int) -> Any:
    """Make the function that quantizes a token by one scale."""
    load, store_codes = group.load(is_aligned), _make_store_codes(is_aligned)

    @_device
    def largest_magnitude(bits, x, start, K, n_groups):  # type: ignore[no-untyped-def]
        largest, last = uint32(0), n_groups - 1
        for g in range(cuda.threadIdx.x, n_groups, 4 * threads):
            # Four loads before the first use. Past the last group it is loaded again, which changes nothing.
            g1, g2, g3 = min(g + threads, last), min(g + 2 * threads, last), min(g + 3 * threads, last)
            a, b, c, d = load(x, start, g, K), load(x, start, g1, K), load(x, start, g2, K), load(x, start, g3, K)
            largest = group.largest_magnitude(group.clear(a, group.byte_of(bits, g)), largest)
            largest = group.largest_magnitude(group.clear(b, group.byte_of(bits, g1)), largest)
            largest = group.largest_magnitude(group.clear(c, group.byte_of(bits, g2)), largest)
            largest = group.largest_magnitude(group.clear(d, group.byte_of(bits, g3)), largest)
        return largest

    @_device
    def quantize_token(bits, scratch, x, codes, absmax, token, shape):  # type: ignore[no-untyped-def]
        _, K, row_stride, n_groups = shape
        start = token * row_stride
        largest = bits_as_float(uint32(block_max(largest_magnitude(bits, x, start, K, n_groups), scratch)))
        inv_scale = _inverse_scale(largest)
        if cuda.threadIdx.x == 0:
            absmax[token] = largest
        for g in range(cuda.threadIdx.x, n_groups, threads):
            values = group.clear(load(x, start, g, K), group.byte_of(bits, g))
            store_codes(codes, token, g, K, values, inv_scale)
        cuda.syncthreads()  # `scratch` is the next token's.

    return quantize_token


def _make_quantize_blocks(is_aligned: bool, threads: int, block_size: int) -> Any:
    """Make the function that quantizes a token by a scale for each block of columns: 8, 16 or 32 lanes of a warp."""
    load, store_codes, lanes = group.load(is_aligned), _make_store_codes(is_aligned), block_size // GROUP

    @_device
    def quantize_token(bits, _scratch, x, codes, absmax, token, shape):  # type: ignore[no-untyped-def]
        _, K, row_stride, n_groups = shape
        start, n_blocks = token * row_stride, (K + block_size - 1) // block_size
        # Whole warps take part in every turn, for they exchange their maxima.
        for g in range(cuda.threadIdx.x, (n_groups + 31) // 32 * 32, threads):
            taken = min(g, n_groups - 1)
            byte = group.byte_of(bits, taken) if g < n_groups else uint32(0xFF)
            values = group.clear(load(x, start, taken, K), byte)
            largest = group.largest_magnitude(values, uint32(0))
            distance = lanes // 2
            while distance > 0:
                largest = max(largest, shuffle_xor(largest, distance))
                distance //= 2
            scale = bits_as_float(uint32(largest))
            if g < n_groups:
                if g % lanes == 0:
                    absmax[token * n_blocks + g // lanes] = scale
                store_codes(codes, token, g, K, values, _inverse_scale(scale))

    return quantize_token


@cache
def _kernel(
    dtype: str, is_finding: bool, is_marked_before: bool, is_aligned: bool, threads: int, block_size: int
) -> Kernel:
    take_stored = make_take_stored(threads)
    quantize_token = (
        _make_quantize_blocks(is_aligned, threads, block_size)
        if block_size
        else _make_quantize_token(is_aligned, threads)
    )
    take_found, warps = make_take_found(is_marked_before, is_aligned, threads), threads // 32

    def activation_quantize(  # type: ignore[no-untyped-def]
        x, outlier_columns, marks, codes, absmax, outlier_x, found_columns, n_found, found_x,
        threshold, M, K, row_stride, n, capacity, pieces, tokens,
    ):  # fmt: skip
        # x [M, K], rows `row_stride` apart; marks uint8 [pieces, K / 8]; the rest as in the reference.
        # Grid: `tokens` tokens a block. Dynamic shared memory: a bit for each column, in words.
        bits, scratch = cuda.shared.array(0, types.uint32), cuda.shared.array(warps, types.uint32)
        shape = (M, K, row_stride, (K + GROUP - 1) // GROUP)
        first = cuda.blockIdx.x * tokens
        end = min(first + tokens, M)
        take_stored(bits, x, outlier_columns, outlier_x, first, end, n, shape)
        total = 0
        if is_finding:
            found = (found_columns, found_x)
            total = take_found(bits, scratch, x, marks, found, threshold, pieces, first, end, capacity, shape)
        if cuda.blockIdx.x == 0 and cuda.threadIdx.x == 0:
            n_found[0] = total
        for token in range(first, end):
            quantize_token(bits, scratch, x, codes, absmax, token, shape)

    values, floats, columns = POINTER[dtype], types.CPointer(types.float32), types.CPointer(types.int32)
    marks, codes = types.CPointer(types.uint8), types.CPointer(types.int8)
    pointers = (values, columns, marks, codes, floats, values, columns, columns, values)
    signature = (*pointers, types.uint32, *[types.int64] * 7)
    return Kernel(activation_quantize, signature, threads, THREADS_HELD // threads if is_aligned else 1)


def mark_bytes(n_tokens: int, n_columns: int, capacity: int, cut: Plan) -> int:
    """Bytes of scratch of the launch that finds columns; 0 if there is no such launch."""
    is_marking = capacity > 0 and n_tokens > cut.own_tokens
    return -(-n_tokens // cut.mark_tokens) * -(-n_columns // GROUP) if is_marking else 0


def launches(operands: Operands, cut: Plan) -> list[Launch]:
    """Plan one launch, or two if columns of many tokens must be found."""
    o = operands
    item_bytes = 4 if o.dtype == "F32" else 2
    is_aligned = (o.x | o.row_stride * item_bytes) % 16 == 0 and (o.result.codes | o.n_columns) % GROUP == 0
    n_groups, pieces = -(-o.n_columns // GROUP), -(-o.n_tokens // cut.mark_tokens)
    threshold = int(np.float32(o.threshold).view(np.uint32))
    is_marking = mark_bytes(o.n_tokens, o.n_columns, o.capacity, cut) > 0
    planned = []
    if is_marking:
        shape = (o.n_tokens, o.n_columns, o.row_stride, n_groups, cut.mark_tokens)
        grid = (-(-n_groups // MARK_THREADS), pieces, 1)
        planned.append(Launch(mark_kernel(o.dtype, is_aligned), grid, 0, (o.x, o.marks, threshold, *shape)))
    pointers = (o.x, o.outlier_columns, o.marks, *o.result[:6])
    sizes = (o.n_tokens, o.n_columns, o.row_stride, o.n_outliers, o.capacity, pieces, cut.tokens)
    # Loads of single values need more registers than 1024 threads have.
    threads = cut.threads if is_aligned else min(cut.threads, 256)
    kernel = _kernel(o.dtype, o.capacity > 0, is_marking, is_aligned, threads, o.result.block_size)
    grid = (max(1, -(-o.n_tokens // cut.tokens)), 1, 1)  # no tokens: one block writes the empty list
    planned.append(Launch(kernel, grid, -(-n_groups // 4) * 4, (*pointers, threshold, *sizes)))
    return planned


def activation_quantize(
    x: torch.Tensor, outlier_columns: torch.Tensor, threshold: float, capacity: int, block_size: int = 0
) -> QuantizedActivations[torch.Tensor]:
    """Quantize the blocks of tokens, outlier columns set aside; `ops` describes and checks the tensors.

    Queued on torch's current stream without waiting. A CUDA graph can capture it once a first call has loaded its
    kernels. The last stride of x is 1.
    """
    import torch

    outlier_columns = outlier_columns.contiguous()
    (M, K), n, device = x.shape, outlier_columns.numel(), x.device
    cut = plan(M, K)
    result = QuantizedActivations(
        torch.empty((M, K), dtype=torch.int8, device=device),
        torch.empty((M, n_blocks(K, block_size)), dtype=torch.float32, device=device),
        torch.empty((M, n), dtype=x.dtype, device=device),
        torch.empty(capacity, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty((M, capacity), dtype=x.dtype, device=device),
        block_size,
    )
    marks = torch.empty(mark_bytes(M, K, capacity, cut), dtype=torch.uint8, device=device)
    written = QuantizedActivations(*(tensor.data_ptr() for tensor in result[:6]))._replace(block_size=block_size)
    read = (format_of(x), x.data_ptr(), outlier_columns.data_ptr(), marks.data_ptr())
    run(launches(Operands(*read, written, threshold, M, K, x.stride(0), n, capacity), cut), device)
    return result
