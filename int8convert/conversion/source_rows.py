"""The rows of a planned tensor as numbers, whatever form the source stores them in."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from int8convert.checkpoint.floats import widen
from int8convert.checkpoint.rows import Block, as_array
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.fp8 import FP8_DTYPES, Fp8Decoder
from int8convert.decoding.int8 import Int8Decoder, Int8Scale
from int8convert.planning.plan import PlannedTensor, TensorAction


def values_dtype(tensor: PlannedTensor) -> str:
    """Return the dtype of the values that `SourceRows` returns."""
    is_decoded = tensor.source.dtype in FP8_DTYPES or tensor.action is TensorAction.DEQUANTIZE
    return "F32" if is_decoded or tensor.lora or tensor.fold else tensor.source.dtype


class SourceRows:
    """The rows of a planned tensor as numbers: codes decoded, an adapter merged, a rotation folded, all in float32."""

    def __init__(self, tensor: PlannedTensor, stored: StoredTensor) -> None:
        self.stored = stored
        self._decoder = _decoder(tensor, stored)
        self._lora = tensor.lora.load() if tensor.lora else None
        if self._lora and tensor.lora and tensor.lora.is_transposed and not tensor.is_quantized:
            self._lora = self._lora.transposed()
        self._fold = tensor.fold.load() if tensor.fold else None
        self.dtype = values_dtype(tensor)

    def values(self, block: Block, begin: int, end: int) -> npt.NDArray[Any]:
        """Return the rows from `begin` to before `end`, C-contiguous, of `dtype`; whole blocks of a fold."""
        rows = as_array(self.stored, block, begin, end)
        if self._decoder:
            rows = self._decoder.decode(rows, begin)
        elif self._lora or self._fold:
            rows = widen(rows, self.stored.dtype)
        rows = self._lora.merge(rows, begin) if self._lora else rows
        return self._fold.apply(rows, begin) if self._fold else rows


def _decoder(tensor: PlannedTensor, stored: StoredTensor) -> Fp8Decoder | Int8Decoder | None:
    if isinstance(tensor.scale, Int8Scale):
        return Int8Decoder(tensor.scale, is_transposed=stored.strides is not None)
    return Fp8Decoder(stored.dtype, tensor.scale) if stored.dtype in FP8_DTYPES else None
