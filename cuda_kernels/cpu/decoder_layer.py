"""A decoder layer for one token of each sequence, on torch tensors; see `kernels.decoder.layer`."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cuda_kernels.cpu.dtypes import BITS_DTYPE, Kind
from cuda_kernels.cpu.kernels.decoder import table
from cuda_kernels.cpu.objects import Kernel
from cuda_kernels.cpu.operations import check
from cuda_kernels.cpu.team import team

_BEFORE, _AFTER = Kernel("decoder.layer", "queries_keys_values"), Kernel("decoder.layer", "attention_and_mlp")
_LIKE = {torch.float16: str(BITS_DTYPE["F16"].str), torch.bfloat16: str(BITS_DTYPE["BF16"].str)}
_BEFORE_KINDS: tuple[Kind, ...] = (*"qqqqqqqqq", ("q",) * 4)
_AFTER_KINDS: tuple[Kind, ...] = (*"qqqqq", ("q",) * 4, ("q",) * 4, ("q",) * 2, "q", ("q",) * 4)

DTYPES = tuple(_LIKE)
"""The dtypes that a layer may compute in."""


@cache
def _entry(is_first: bool, dtype: torch.dtype) -> Any:
    kernel, kinds = (_BEFORE, _BEFORE_KINDS) if is_first else (_AFTER, _AFTER_KINDS)
    return kernel.entry((*kinds, _LIKE[dtype]))


def float_field(value: float) -> int:
    """Return what stands for a float in a table."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


class DecoderLayer:
    """The layer that a table describes.

    Args:
        scalars, norms, linears: as in `kernels.decoder.table`.
        tensors: those that own these addresses; they are kept alive.
    """

    def __init__(
        self,
        scalars: Sequence[int],
        norms: Sequence[Sequence[int]],
        linears: Sequence[Sequence[int]],
        tensors: Sequence[Tensor],
    ) -> None:
        values = [*scalars, *(value for part in (*norms, *linears) for value in part)]
        self._table = (ctypes.c_int64 * table.TABLE_SIZE)(*values)
        self._address = ctypes.addressof(self._table)
        self._tensors = tensors
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._n_heads, self._n_groups, self.head_size, self.hidden_size = scalars[:4]

    def is_in_place(self) -> bool:
        """Return whether the tensors are still where they were."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses

    def queries_keys_values(self, x: Tensor, angles: Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, 1, D], and keys and values [B, groups, 1, D].

        Args:
            x: float16 or bfloat16 [B, 1, hidden size], contiguous.
            angles: cosine and sine of the positions, [B, 1, D] or [1, 1, D] in the dtype of x, contiguous; None if
                positions do not rotate.

        Raises:
            ValueError: x has another size.
        """
        self._check_size(x)
        n_tokens = x.shape[0]
        q = x.new_empty((n_tokens, self._n_heads, 1, self.head_size))
        k = x.new_empty((n_tokens, self._n_groups, 1, self.head_size))
        v = torch.empty_like(k)
        cos_at, sin_at = (0, 0) if angles is None else (angles[0].data_ptr(), angles[1].data_ptr())
        angle_stride = 0 if angles is None or angles[0].shape[0] == 1 else self.head_size
        result = (ctypes.c_int64 * 2)()
        addresses = (x.data_ptr(), cos_at, sin_at, angle_stride, q.data_ptr(), k.data_ptr(), v.data_ptr())
        threads = team(torch.get_num_threads())
        _entry(True, x.dtype)(result, result, self._address, n_tokens, *addresses, *threads, 0)
        check(result[0], None, x.shape[-1])
        return q, k, v

    def attention_and_mlp(
        self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the layer's outputs, [B, 1, hidden size].

        Args:
            x, q: the layer's inputs, and the queries that `queries_keys_values` returned for them.
            keys, values: [B, groups, S, D] in the dtype of x; copied first if their last stride is not 1.
            mask: bool [B, 1, 1, S] or [1, 1, 1, S], the last stride 1: which positions are attended to; None for all.

        Raises:
            ValueError: x, keys, values or mask have other shapes or dtypes.
        """
        n_sequences, n_positions = x.shape[0], keys.shape[2]
        size = (n_sequences, self._n_groups, n_positions, self.head_size)
        self._check_size(x)
        if any(each.shape != size or each.dtype != x.dtype for each in (keys, values)):
            found = " and ".join(f"{each.dtype} {list(each.shape)}" for each in (keys, values))
            raise ValueError(f"expected keys and values of {x.dtype} {list(size)}, found {found}")
        keys, values = (each if each.stride(3) == 1 else each.contiguous() for each in (keys, values))
        if mask is not None and (mask.shape[0] not in (1, n_sequences) or mask.shape[3] != n_positions):
            raise ValueError(f"expected a mask [{n_sequences}, 1, 1, {n_positions}], found {list(mask.shape)}")
        allowed = (0, 0) if mask is None else (mask.data_ptr(), 0 if mask.shape[0] == 1 else mask.stride(0))
        y, result = torch.empty_like(x), (ctypes.c_int64 * 2)()
        stored = [each for tensor in (keys, values) for each in (tensor.data_ptr(), *_byte_strides(tensor))]
        sizes = (self._address, n_sequences, n_positions)
        threads = team(torch.get_num_threads())
        _entry(False, x.dtype)(
            *(result, result, *sizes, x.data_ptr(), q.data_ptr(), *stored, *allowed, y.data_ptr(), *threads, 0)
        )
        check(result[0], None, x.shape[-1])
        return y

    def _check_size(self, x: Tensor) -> None:
        if x.shape[1:] != (1, self.hidden_size) or not x.is_contiguous():
            raise ValueError(f"expected contiguous x [B, 1, {self.hidden_size}], found {list(x.shape)}")


def _byte_strides(tensor: Tensor) -> list[int]:
    return [stride * tensor.element_size() for stride in tensor.stride()[:3]]
