"""int8 weights and their scales: codes of one of our formats, one scale for each row, back to float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import widen
from int8convert.checkpoint.source import SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.scale import read_scale
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of


@dataclass(frozen=True, slots=True)
class Int8Scale:
    """The scale of one int8 weight.

    Attributes:
        stored: one float for each row of codes.
        shard: the file it is in, which may be another than the codes'.
        format: the format that says what the floats mean.
    """

    stored: StoredTensor
    shard: SourceShard = field(repr=False)
    format: Format

    def read(self) -> npt.NDArray[np.float32]:
        """Return the floats as stored, float32 [rows]. 16-bit ones are widened, which is exact."""
        return widen(read_scale(self), self.stored.dtype).reshape(-1)


class Int8Decoder:
    """Turns codes of one weight into the float32 weights that its format's loader computes. For several threads.

    Args:
        scale: read at once.
        is_transposed: the codes are given as [in, out], as Conv1D stores weights; their scale is by column then.
    """

    def __init__(self, scale: Int8Scale, is_transposed: bool) -> None:
        self._dequantize = module_of(scale.format).dequantize
        self._stored = scale.read()
        self._is_transposed = is_transposed

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> npt.NDArray[np.float32]:
        """Return float32 weights, C-contiguous.

        Args:
            codes: bytes of int8 [rows, columns], of which the first is row `first_row`.
        """
        signed = codes.view(np.int8)
        if self._is_transposed:
            return np.ascontiguousarray(self._dequantize(signed.T, self._stored).T)
        return self._dequantize(signed, self._stored[first_row : first_row + len(signed)])
