"""Weights that are the value of a code times the scale of its block, in float32, rounded once.

Covers FP8, MXFP8, MXFP4, NVFP4 and one-byte integers: they differ in the values of their codes and in what their scales
are made of. Scales of a matrix are read whole: they are at most 1/8 of its codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from int8convert.checkpoint.floats import NUMPY_DTYPE, widen
from int8convert.decoding.coding import Rows, element_at, matrix_at
from int8convert.decoding.scale import read_scale
from int8convert.decoding.values import E2M1, E8M0_DTYPES, Values, e8m0_values, fp8_values
from int8convert.formats.int8_checkpoint import PlacedTensor

FP4 = "E2M1"
"""Codes of 4-bit floats, two in a byte, the low half first."""

SCALE_DTYPES = frozenset({*NUMPY_DTYPE, *E8M0_DTYPES, "F8_E4M3"})


@dataclass(frozen=True, slots=True)
class BlockCoding:
    """Codes of one matrix or of the matrices of experts, and the scale of each block.

    Attributes:
        elements: what a code is: `FP4`, F8_E4M3, F8_E5M2 or I8.
        scale: one value in all, [rows] or [rows, 1], or [block rows, block columns]; the same for each of [experts].
        block: rows and columns that share a value.
        tensor_scale: a float by which all scales are multiplied, one or [experts]; None if there is none.
        divides: scales are divided by `tensor_scale`.
        zeros: I8, what is subtracted from the codes of a block; None if nothing is.
        rows: the rows that the codes are, of the matrix that has the scale; None if they are all.
    """

    elements: str
    scale: PlacedTensor
    block: tuple[int, int]
    tensor_scale: PlacedTensor | None = None
    divides: bool = False
    zeros: PlacedTensor | None = None
    rows: Rows | None = None
    rows_together = 1

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        return tuple(tensor for tensor in (self.scale, self.tensor_scale, self.zeros) if tensor is not None)

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return (*codes[:-1], codes[-1] * 2) if self.elements == FP4 else codes

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin, end

    def identity(self) -> list[Any]:
        others = [tensor.name for tensor in self.beside[1:]]
        rows = [self.rows.first, self.rows.step] if self.rows else []
        return [self.scale.shard.path.name, self.scale.name, self.block, *([others, rows] if others or rows else [])]

    def piece(self, rows: Rows, n_out: int) -> BlockCoding:
        """Return the coding of rows of one of [experts, out, columns]; `n_out` are the rows of each."""
        expert, first = divmod(rows.first, n_out)
        tensor_scale = self.tensor_scale
        if tensor_scale is not None and tensor_scale.stored.n_elements > 1:
            tensor_scale = element_at(tensor_scale, expert)
        scale = self.scale
        if len(scale.stored.shape) < 3:
            scale = element_at(scale, expert if scale.stored.n_elements > 1 else 0)
            return replace(self, scale=scale, block=(rows.n, self.block[1]), tensor_scale=tensor_scale)
        if self.block[0] == 1:
            return replace(self, scale=rows.of(scale), tensor_scale=tensor_scale)
        place = replace(rows, first=first)
        return replace(self, scale=matrix_at(scale, expert), tensor_scale=tensor_scale, rows=place)

    def open(self) -> BlockDecoder:
        return BlockDecoder(self)

    def read_scale(self) -> Values:
        """Return the scale of each block, float32 [block rows, block columns]."""
        stored = self.scale.stored
        values = read_scale(self.scale)
        if stored.dtype in E8M0_DTYPES:
            wide = e8m0_values(values, stored.name)
        elif stored.dtype == "F8_E4M3":
            wide = fp8_values(stored.dtype)[values]
        else:
            wide = widen(values, stored.dtype)
        if self.tensor_scale is not None:
            factor = widen(read_scale(self.tensor_scale), self.tensor_scale.stored.dtype).reshape(())
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                wide = wide / factor if self.divides else wide * factor
        return self._of_rows(wide)

    def read_zeros(self, shape: tuple[int, ...]) -> Values:
        """Return what is subtracted from the codes of each block, float32 in the shape of the scale."""
        if self.zeros is None:
            return np.zeros(shape, np.float32)
        return self._of_rows(read_scale(self.zeros).view(np.int8).astype(np.float32))

    def _of_rows(self, values: npt.NDArray[Any]) -> Values:
        columns = values.shape[-1] if values.ndim > 1 else 1
        grid = np.ascontiguousarray(values, np.float32).reshape(-1, columns)
        if self.rows is None:
            return grid
        at = self.rows.first + self.rows.step * np.arange(self.rows.n)
        return np.ascontiguousarray(grid[at // self.block[0]])


class BlockDecoder:
    """Turns codes of one matrix into weights. Holds its scale in memory."""

    def __init__(self, coding: BlockCoding) -> None:
        self._scale = coding.read_scale()
        self._zeros = coding.read_zeros(self._scale.shape)
        self._block = coding.block if coding.rows is None else (1, coding.block[1])
        self._bits = 4 if coding.elements == FP4 else 8
        self._values = _values_of(coding.elements)

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> Values:
        weight = np.empty((len(codes), codes.shape[1] * 8 // self._bits), np.float32)
        cpu.dequantize_packed(
            codes.view(np.uint8), self._bits, self._values, self._zeros, self._scale, first_row, self._block, weight
        )
        return weight


def _values_of(elements: str) -> Values:
    if elements == FP4:
        return E2M1
    if elements == "I8":
        return np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32)
    return fp8_values(elements)


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scale of a weight [.., out, in] in blocks; the last one may be smaller."""
    return (*shape[:-2], *(-(-n // size) for n, size in zip(shape[-2:], block, strict=True)))


def is_one_per_matrix(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a scale has one value for each matrix of a weight."""
    return prod(scale) in (1, prod(weight[:-2]))
