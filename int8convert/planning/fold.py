"""Folds rotations and factors into weights: the model computes the same, and int8 holds its weights or inputs better.

A fold turns a matrix W [out, in], whatever its layout in the file, into

    W' = R_out diag(r) (W diag(gain c)) R_in H

R are block-diagonal: each block is the regular Hadamard matrix of `cuda_kernels.reference.rotate`, or the number 1. H
is the same with `reference.hadamard`, where the loader rotates the input. `gain` is that of the norm whose output the
matrix reads. r and c are factors of rows and columns. A vector is a matrix of one column. A fold is computed in
float32. Only rows of one block depend on each other.

Which tensors get which fold is decided by `rotation`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cuda_kernels import cpu
from cuda_kernels.reference import hadamard
from int8convert.checkpoint.floats import widen
from int8convert.decoding.scale import read_scale
from int8convert.errors import SourceError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Gain:
    """The gain of a norm.

    Attributes:
        weight: the norm's weight [n].
        offset: what the norm adds to it: 1 in Gemma's norms, which multiply by 1 + weight, else 0.
    """

    weight: PlacedTensor
    offset: float

    def load(self) -> Values:
        """Read the gain, float32 [n].

        Raises:
            SourceError: it is zero somewhere, or not finite; or the file cannot be read.
        """
        gain = widen(read_scale(self.weight), self.weight.stored.dtype) + np.float32(self.offset)
        if not (np.isfinite(gain) & (gain != 0)).all():
            raise SourceError(
                f"the gain {quoted(self.weight.name)} holds zero, NaN or infinity, so it cannot be folded",
                "convert without --rotate and --rotate-inputs",
            )
        return gain


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of rows or of columns, float32 [n].

    Attributes:
        sha256: hash of their bytes, which comparisons of folds use.
    """

    values: Values = field(repr=False, compare=False)
    sha256: str

    @classmethod
    def of(cls, values: Values) -> Factors:
        return cls(values, hashlib.sha256(values.tobytes()).hexdigest())


@dataclass(frozen=True, slots=True)
class Fold:
    """What is done to one stored tensor. Rows and columns are those of the tensor as it is read.

    Attributes:
        gain: multiplies the columns; the rows, if `gain_of_rows`.
        divides: the gain divides instead of multiplying.
        row_block, column_block: size of the rotated blocks of rows and of columns; 1 rotates nothing.
        constant: replaces every value, and the rest of the fold is ignored; None keeps the values.
        input_block: size of the blocks of columns by which the loader rotates the input while the model runs; 1 if it
            does not.
        row_factors, column_factors: multiply rows and columns; None multiplies nothing.
        offset: added before rows are multiplied, and subtracted afterwards; see `Gain`.
    """

    gain: Gain | None = field(default=None, repr=False)
    gain_of_rows: bool = False
    divides: bool = False
    row_block: int = 1
    column_block: int = 1
    constant: float | None = None
    input_block: int = 1
    row_factors: Factors | None = None
    column_factors: Factors | None = None
    offset: float = 0.0

    def transposed(self) -> Fold:
        """Return the fold of the same matrix stored [in, out]."""
        return replace(
            self,
            gain_of_rows=not self.gain_of_rows,
            row_block=self.column_block,
            column_block=self.row_block,
            input_block=1,
            row_factors=self.column_factors,
            column_factors=self.row_factors,
        )

    def of_inputs(self) -> Fold:
        """Return the fold of the rows of X [tokens, in], the inputs of this matrix: X' W'^T = X W^T diag(r) R_out.

        What the loader rotates while the model runs is rotated here, too.
        """
        gain = None if self.gain_of_rows else self.gain
        return Fold(
            gain,
            divides=not self.divides,
            column_block=self.column_block,
            input_block=self.input_block,
            column_factors=self.column_factors and Factors.of(np.float32(1) / self.column_factors.values),
        )

    def identity(self) -> list[str | float | bool | None]:
        """Return all that decides the folded values, as JSON; it is part of what a resumed run compares."""
        gain = [self.gain.weight.shard.path.name, self.gain.weight.name, self.gain.offset] if self.gain else [None]
        factors = [factors.sha256 if factors else None for factors in (self.row_factors, self.column_factors)]
        return [
            *gain,
            self.gain_of_rows,
            self.divides,
            self.row_block,
            self.column_block,
            self.constant,
            self.input_block,
            *([*factors, self.offset] if any(factors) else []),
        ]

    def load(self) -> LoadedFold:
        """Read the gain; see `Gain.load`."""
        factors = None
        if self.gain is not None:
            factors = self.gain.load()
            factors = np.float32(1) / factors if self.divides else factors
        return LoadedFold(self, factors)


@dataclass(frozen=True, slots=True)
class LoadedFold:
    """A fold with its gain in memory, float32. Immutable, so several threads may share it."""

    fold: Fold
    factors: Values | None = field(repr=False)

    def apply(self, rows: Values, begin: int) -> Values:
        """Return the folded rows in a new array.

        Args:
            rows: float32 [n, ...], the rows from `begin` on; whole blocks. Not changed.
        """
        if self.fold.constant is not None:
            return np.full_like(rows, self.fold.constant)
        matrix = rows.reshape(len(rows), -1)
        if self.factors is None:
            folded = matrix.copy()
        elif self.fold.gain_of_rows:
            folded = matrix * self.factors[begin : begin + len(rows), None]
        else:
            folded = matrix * self.factors
        if self.fold.column_factors is not None:
            folded *= self.fold.column_factors.values
        if self.fold.row_factors is not None:
            folded += np.float32(self.fold.offset)
            folded *= self.fold.row_factors.values[begin : begin + len(rows), None]
            folded -= np.float32(self.fold.offset)
        if self.fold.column_block > 1:
            cpu.rotate(folded, self.fold.column_block)
        if self.fold.row_block > 1:
            cpu.rotate(folded, self.fold.row_block, axis=0)
        if self.fold.input_block > 1:
            folded = hadamard(folded, self.fold.input_block)
        return folded.reshape(rows.shape)
