"""Integers of 2 to 8 bits in words of 32, a scale and a zero point for each group of a row: W = (code - zero) * scale.

Code k of a row is bits [k * bits, (k + 1) * bits) of the row's words, the lowest first, across words. The zero points
of a group are packed the same way, along the rows of the weight. `pack_quantized` and `gptq` find such weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.floats import widen
from int8convert.decoding.coding import REFETCH
from int8convert.decoding.scale import read_scale
from int8convert.decoding.values import Values
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class PackedCoding:
    """Codes as words [out, words].

    Attributes:
        scale: [out, groups], or [out]; [groups, out] if `is_by_column`.
        zeros: I32, packed along the rows: [words, groups], or [groups, words] if `is_by_column`; None if all zero
            points are half of the codes' range.
        zero_step: added to each zero point, modulo the codes' range.
        is_by_column: a row of the weight is a column of all tensors.
        group_of: I32 [in], the group of each input; None if groups are contiguous.
        stated_shape: I64 [2], the weight's shape again; None if it is not stored.
    """

    bits: int
    n_columns: int
    scale: PlacedTensor
    zeros: PlacedTensor | None
    zero_step: int = 0
    is_by_column: bool = False
    group_of: PlacedTensor | None = None
    stated_shape: PlacedTensor | None = None
    rows_together = 1

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        found = (self.scale, self.zeros, self.group_of, self.stated_shape)
        return tuple(tensor for tensor in found if tensor is not None)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return (codes[0], self.n_columns)

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin, end

    def identity(self) -> list[Any]:
        names = [[tensor.shard.path.name, tensor.name] for tensor in self.beside]
        return [self.bits, self.n_columns, self.zero_step, self.is_by_column, names]

    def open(self) -> PackedDecoder:
        """Read scale, zero points and groups.

        Raises:
            CorruptFileError: the stored shape is another, or a group is none of the scale's.
        """
        scale = widen(read_scale(self.scale), self.scale.stored.dtype)
        scale = scale.reshape(scale.shape[0], -1)
        scale = np.ascontiguousarray(scale.T if self.is_by_column else scale)
        self._check_shape(len(scale))
        zeros = np.full(scale.shape, 1 << (self.bits - 1), np.float32)
        if self.zeros is not None:
            words = read_scale(self.zeros)
            raw = unpack_words(words if self.is_by_column else words.T, self.bits, len(scale)).T
            zeros = np.ascontiguousarray((raw.astype(np.int32) + self.zero_step) % (1 << self.bits), np.float32)
        return PackedDecoder(self, scale, zeros, self._groups(scale.shape[1]))

    def _check_shape(self, n_rows: int) -> None:
        if self.stated_shape is None:
            return
        stated = read_scale(self.stated_shape).view(np.int64).tolist()
        if stated != [n_rows, self.n_columns]:
            raise CorruptFileError(
                f"{quoted(self.stated_shape.name)} says {stated}, expected {[n_rows, self.n_columns]} by the codes",
                REFETCH,
            )

    def _groups(self, n_groups: int) -> npt.NDArray[np.int32] | None:
        """Return the group of each input; None if each group's inputs are contiguous."""
        if self.group_of is None or n_groups == 1:
            return None
        groups = read_scale(self.group_of).view(np.int32)
        if ((groups < -n_groups) | (groups >= n_groups)).any():
            raise CorruptFileError(
                f"{quoted(self.group_of.name)} names groups beyond the {n_groups} of the scale", REFETCH
            )
        groups = np.ascontiguousarray(groups % n_groups, np.int32)
        contiguous = np.arange(self.n_columns) // -(-self.n_columns // n_groups)
        # Zeros alone are a known broken export of contiguous groups.
        return None if not groups.any() or np.array_equal(groups, contiguous) else groups


class PackedDecoder:
    """Turns words into weights. Holds scale and zero points of the matrix, float32 [out, groups]."""

    def __init__(
        self, coding: PackedCoding, scale: Values, zeros: Values, groups: npt.NDArray[np.int32] | None
    ) -> None:
        self._bits, self._n_columns = coding.bits, coding.n_columns
        self._scale, self._zeros, self._groups = scale, zeros, groups
        self._values = np.arange(1 << coding.bits, dtype=np.float32)

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> Values:
        packed = codes.view(np.uint8)
        weight = np.empty((len(codes), self._n_columns), np.float32)
        common = (packed, self._bits, self._values, self._zeros, self._scale, first_row)
        if self._groups is None:
            cpu.dequantize_packed(*common, (1, -(-self._n_columns // self._scale.shape[1])), weight)
        else:
            cpu.dequantize_reordered(*common, self._groups, weight)
        return weight


def unpack_words(words: npt.NDArray[Any], bits: int, n: int) -> npt.NDArray[np.uint8]:
    """Return the first `n` codes of each row of words."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : n * bits]
    codes: npt.NDArray[np.uint8] = np.packbits(stream.reshape(len(words), n, bits), axis=2, bitorder="little")[..., 0]
    return codes
