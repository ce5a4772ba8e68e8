"""Merges a LoRA adapter into a weight, rows at a time: `LoadedDelta.merge` adds scaling * B @ A to a block of rows.

Costs the matrices of the loaded modules, `LoraDelta.n_bytes` each, and a block of rows in float32, or two with DoRA.
The last bits are not defined: B @ A is computed by BLAS, where they depend on the processor and on the number of rows.
On one machine, the same blocks give the same bits.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import widen
from int8convert.checkpoint.rows import read_whole
from int8convert.checkpoint.source import ShardReader, SourceShard, reading
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import AdapterError
from int8convert.planning.adapters.adapter import LowRankUpdate
from int8convert.text import quoted

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """What an adapter does to one weight.

    Attributes:
        shape: of the weight as [out, in], however it is stored; of an embedding as stored.
        is_transposed: the weight is stored [in, out].
    """

    update: LowRankUpdate = field(repr=False)
    shard: SourceShard = field(repr=False)
    is_transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.shape

    @property
    def n_bytes(self) -> int:
        """Bytes of memory once loaded."""
        rows, columns = self.shape
        return 4 * (self.update.rank * (rows + columns) + (rows if self.update.magnitude is not None else 0))

    def load(self) -> LoadedDelta:
        """Read the matrices.

        Raises:
            AdapterError: they hold NaN or infinity.
            CorruptFileError: the file is not the one whose header was read.
            SourceError: the file cannot be read.
        """
        update = self.update
        with reading(self.shard.path.name), closing(self.shard.open()) as reader:
            a = read_float32(update.a, reader)
            b = read_float32(update.b, reader)
            magnitude = None if update.magnitude is None else read_float32(update.magnitude, reader)
        for what, values in (("A", a), ("B", b), ("magnitudes", magnitude)):
            if values is not None and not np.isfinite(values).all():
                raise AdapterError(
                    f"the adapter's {what} for {quoted(update.module_name)} hold NaN or infinity",
                    "train or fetch the adapter again: merged, it would spoil the whole row of a weight",
                )
        left, right = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if update.is_embedding else (b, a)
        return LoadedDelta(left, right, update.scaling, magnitude)


@dataclass(frozen=True, slots=True)
class LoadedDelta:
    """One module's matrices. Immutable, so several threads may share it.

    Attributes:
        left: float32 [rows, rank].
        right: float32 [rank, columns].
        magnitude: float32 [rows], the length DoRA gives each merged row; None without DoRA.
    """

    left: Matrix = field(repr=False)
    right: Matrix = field(repr=False)
    scaling: float
    magnitude: Matrix | None = field(repr=False)

    def rows(self, begin: int, end: int) -> Matrix:
        """Return scaling * B[begin:end] @ A, without DoRA's part, as a new array, float32 [end - begin, columns].

        B @ A is rounded to float32 before scaling.
        """
        delta = self.left[begin:end] @ self.right
        delta *= np.float32(self.scaling)
        return delta

    def merge(self, weight: Matrix, begin: int) -> Matrix:
        """Return the merged rows of a base weight, in a new array: W + scaling * B @ A.

        With DoRA: m * (W + D) / |W + D|, with each row's length over all its columns, in PEFT's order: m / |W + D|
        first. A row of length zero becomes NaN, as in PEFT.

        Args:
            weight: float32 [n, columns], the rows from `begin` on; not changed.

        Source: peft/tuners/lora/layer.py, Linear.merge; variants.py, DoraLinearVariant.merge_unsafe.
        """
        merged = self.rows(begin, begin + len(weight))
        merged += weight
        if self.magnitude is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                factor = self.magnitude[begin : begin + len(weight)] / np.linalg.norm(merged, axis=1)
                merged *= factor[:, np.newaxis]
        return merged

    def transposed(self) -> LoadedDelta:
        """Return the update for a weight that stays stored as [in, out].

        Raises:
            AdapterError: the adapter uses DoRA, whose lengths are of rows, here columns.
        """
        if self.magnitude is not None:
            raise AdapterError(
                "the adapter uses DoRA on a transposed weight that stays 16-bit, which is not merged here",
                "merge it with PEFT, and convert the merged checkpoint",
            )
        left, right = np.ascontiguousarray(self.right.T), np.ascontiguousarray(self.left.T)
        return LoadedDelta(left, right, self.scaling, None)


def read_float32(stored: StoredTensor, reader: ShardReader) -> Matrix:
    """Return a tensor's values as float32. Exact, except that F64 is rounded to nearest even."""
    return widen(read_whole(stored, reader), stored.dtype)
