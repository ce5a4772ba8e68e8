"""Weight rows -> int8 codes and their absmax on a CUDA device; `reference.row_quantize` is the meaning.

    absmax[i]    = max_k |weight[i, k]|
    inv_scale[i] = fl32(fl32(1 / absmax[i]) * 127)                     0 where that is not finite
    codes[i, k]  = rint(fl32(weight[i, k] * inv_scale[i]))             ties to even

Moves 2 bytes in and 1 out for each fp16 or bf16 weight, 4 and 1 for fp32, and 12 bytes a row. That is the floor: the
machine code has twelve instructions a weight, and an H200 could issue twenty while the memory moves its bytes. To stay
there a row must cross the memory once, though its codes need its absmax first, so it waits in shared memory: a row of
up to 2 KiB in a warp's part, a longer one in a block's, and what of it does not fit is read again, from L2 if it is
still there. Rows that are no whole aligned vectors of 16 bytes are read twice, one value at a time, by the naive
kernel, which is the first to read; no checkpoint we know has such rows.

What it does not know: whether the weights are finite. NaN and infinity show in `absmax`, as in the reference. Not yet
measured on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuda_kernels.cuda.launch import Launch, most_shared_bytes, run
from cuda_kernels.cuda.row_kernels import BY_VALUES, OF_A_BLOCK, OF_A_WARP, VECTOR_BYTES, WARP_ROW_BYTES, WARPS
from cuda_kernels.reference import QuantizedRows

if TYPE_CHECKING:
    import torch

MOST_KEPT_BYTES = 112 * 1024
"""Of a row in shared memory: half of an H200's multiprocessor, so that one block loads while another stores."""

STATIC_SHARED_BYTES = 1024
"""More than a block of the kernels has beside what it keeps."""


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
    """What to launch for matrices at these addresses; none for a matrix without rows.

    Args:
        weight: of the first value; `dtype` is "F16", "BF16" or "F32".
        shape: rows and columns, each under 2^31.
        row_stride: values from one row to the next, at least the columns.
        codes: int8, a row's codes right after the last one's. absmax, signal, noise: float32, one a row.
        kept_bytes: dynamic shared memory that a block may have; see `kept_bytes_of`.
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
    """How much of a row a block keeps in shared memory on a device."""
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
