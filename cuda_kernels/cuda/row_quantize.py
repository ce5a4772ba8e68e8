"""Weight rows to int8 codes and their absmax on a CUDA device; see `reference.row_quantize`.

    absmax[i]    = max_k |weight[i, k]|
    inv_scale[i] = fl32(fl32(1 / absmax[i]) * 127)                     0 if that is not finite
    codes[i, k]  = rint(fl32(weight[i, k] * inv_scale[i]))             ties to even

It reads 2 bytes and writes 1 for each fp16 or bf16 weight, 4 and 1 for fp32, and writes 12 bytes a row. That is the
floor: the machine code has twelve instructions a weight, and an H200 could issue twenty while the memory moves its
bytes. To stay there, a row must be read from memory once, although its codes need its absmax first. So it is kept in
shared memory: a row of up to 2 KiB in a warp's part, a longer one in a block's. The part of a row that does not fit is
read again, usually from L2. Rows that are not whole aligned vectors of 16 bytes are read twice, one value at a time, by
the naive kernel; no known checkpoint has such rows.

Finiteness of the weights is not checked: NaN and infinity show in `absmax`, as in the reference. Not yet measured on a
GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuda_kernels.cuda.launch import Launch, most_shared_bytes, run
from cuda_kernels.cuda.row_kernels import BY_VALUES, OF_A_BLOCK, OF_A_WARP, VECTOR_BYTES, WARP_ROW_BYTES, WARPS
from cuda_kernels.reference import QuantizedRows

if TYPE_CHECKING:
    import torch

MOST_KEPT_BYTES = 112 * 1024
"""The most bytes of a row in shared memory: half of an H200's, so that one block loads while another stores."""

STATIC_SHARED_BYTES = 1024
"""Bytes of shared memory reserved for the kernels' static arrays, which are smaller."""


def launches(
    weight: int,
    dtype: str,
    shape: tuple[int, int],
    row_stride: int,
    codes: int,
    absmax: int,
    signal: int,
    noise: int,
    kept_bytes: int,
) -> list[Launch]:
    """Plan the launch for a matrix at these addresses, or none for a matrix without rows.

    Args:
        weight: the address of the first value. dtype: "F16", "BF16" or "F32".
        shape: rows and columns, each under 2^31.
        row_stride: values from one row to the next, at least the columns.
        codes: the address of int8 [rows, columns], contiguous. absmax, signal, noise: of float32 [rows].
        kept_bytes: the most dynamic shared memory of a block; see `kept_bytes_of`.
    """
    rows, columns = shape
    item_bytes = 4 if dtype == "F32" else 2
    outputs = (codes, absmax, signal, noise)
    if rows == 0:
        return []
    is_vectors = not any(n % VECTOR_BYTES for n in (weight, columns * item_bytes, row_stride * item_bytes))
    if columns == 0 or codes % 8 or not is_vectors:
        return [Launch(BY_VALUES[dtype], (rows, 1, 1), 0, (weight, *outputs, columns, row_stride))]
    vectors = columns * item_bytes // VECTOR_BYTES
    if columns * item_bytes <= WARP_ROW_BYTES:
        grid = (-(-rows // WARPS), 1, 1)
        return [Launch(OF_A_WARP[dtype], grid, 0, (weight, *outputs, rows, vectors, row_stride))]
    n_kept = min(vectors, kept_bytes // VECTOR_BYTES)
    args = (weight, *outputs, vectors, n_kept, row_stride)
    return [Launch(OF_A_BLOCK[dtype], (rows, 1, 1), n_kept * VECTOR_BYTES, args)]


def kept_bytes_of(device: torch.device) -> int:
    """The most bytes of a row that a block keeps in shared memory on a device."""
    return min(most_shared_bytes(device) - STATIC_SHARED_BYTES, MOST_KEPT_BYTES)


def row_quantize(weight: torch.Tensor) -> QuantizedRows[torch.Tensor]:
    """Quantize each row; bit-equal to `reference.row_quantize` in codes and absmax. Queued without waiting.

    signal and noise are float32 sums, always added in the same order.

    Args:
        weight: float16, bfloat16 or float32 [rows, columns] on a CUDA device; its last stride is 1.

    Raises:
        ValueError: the weight is another tensor.
    """
    import torch

    dtype = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}.get(weight.dtype)
    if dtype is None or weight.dim() != 2 or not weight.is_cuda or (weight.shape[1] > 1 and weight.stride(1) != 1):
        raise ValueError(
            "weight must be float16, bfloat16 or float32 [rows, columns] on a CUDA device, its last stride 1, "
            f"not {weight.dtype} {tuple(weight.shape)} on {weight.device} with strides {weight.stride()}"
        )
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    absmax, signal, noise = torch.empty((3, rows), dtype=torch.float32, device=weight.device)
    addresses = (codes.data_ptr(), absmax.data_ptr(), signal.data_ptr(), noise.data_ptr())
    kept_bytes = kept_bytes_of(weight.device)
    planned = launches(weight.data_ptr(), dtype, (rows, columns), weight.stride(0), *addresses, kept_bytes)
    run(planned, weight.device)
    return QuantizedRows(codes, absmax, signal, noise)
