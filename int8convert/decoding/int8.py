"""int8 weights and their scales: codes of one of our formats, one scale for each row, back to float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import widen
from int8convert.decoding.scale import read_scale
from int8convert.formats.format import Format
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.formats.modules import module_of


@dataclass(frozen=True, slots=True)
class Int8Coding:
    """The coding of one int8 weight.

    Attributes:
        scale: one float for each row of codes.
        format: the format that says what the floats mean.
        is_transposed: the codes are read as [in, out], as Conv1D stores weights; their scale is by column then.
    """

    scale: PlacedTensor
    format: Format
    is_transposed: bool = False
    rows_together = 1

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        return (self.scale,)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return codes

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin, end

    def identity(self) -> list[Any]:
        return [self.scale.shard.path.name, self.scale.name, self.format]

    def read_scale(self) -> npt.NDArray[np.float32]:
        """Return the floats as stored, float32 [rows]. 16-bit ones are widened, which is exact."""
        return widen(read_scale(self.scale), self.scale.stored.dtype).reshape(-1)

    def open(self) -> Int8Decoder:
        return Int8Decoder(self)


class Int8Decoder:
    """Turns codes of one weight into the float32 weights that its format's loader computes. For several threads."""

    def __init__(self, coding: Int8Coding) -> None:
        self._dequantize = module_of(coding.format).dequantize
        self._stored = coding.read_scale()
        self._is_transposed = coding.is_transposed

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> npt.NDArray[np.float32]:
        """Return float32 weights, C-contiguous.

        Args:
            codes: bytes of int8 [rows, columns], of which the first is row `first_row`.
        """
        signed = codes.view(np.int8)
        if self._is_transposed:
            return np.ascontiguousarray(self._dequantize(signed.T, self._stored).T)
        return self._dequantize(signed, self._stored[first_row : first_row + len(signed)])
