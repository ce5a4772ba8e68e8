"""What a low-bit weight is made of, and how its rows become floats: the types that all formats share.

A format is one module with a function `find`, which yields the weights of a checkpoint that are stored in it, and a
line in `source_weights`. The layouts are told apart by names, dtypes and shapes, because real configs disagree with
their files; the config decides where those cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor, contiguous_strides
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted

Places = Mapping[str, PlacedTensor]
"""Name -> tensor of a checkpoint."""

REFETCH = "fetch the checkpoint again, or convert its 16-bit version"


class Decoder(Protocol):
    """Turns codes of one tensor into float32 weights. Holds scales in memory. For several threads."""

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> npt.NDArray[np.float32]:
        """Return the weights of some codes, C-contiguous.

        Args:
            codes: rows of the stored tensor, as `rows.as_array` holds them.
            first_row: the weight's row that the first of them belongs to.
        """


class Coding(Protocol):
    """How the codes of one matrix, or of the matrices of several experts, become weights."""

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        """The tensors that are read before the codes, such as scales and zero points."""

    @property
    def rows_together(self) -> int:
        """Rows whose codes share bytes: a block begins at a multiple of this number."""

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the weight's shape by that of its codes: [out, in], or [experts, out, in]."""

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        """Return the rows of the codes that hold the weight's rows from `begin` to before `end`."""

    def identity(self) -> list[Any]:
        """Return what decides the values beside the codes, as JSON; it is part of what a resumed run compares."""

    def open(self) -> Decoder:
        """Read the tensors beside the codes."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Every `step`-th row from `first` on, `n` in all, of a tensor [..., columns] whose outer dimensions are flat."""

    first: int
    step: int
    n: int

    def of(self, tensor: PlacedTensor) -> PlacedTensor:
        """Return these rows of a contiguous tensor as a view [n, columns]."""
        stored, columns = tensor.stored, tensor.stored.shape[-1]
        strides = None if self.step == 1 else (self.step * columns, 1)
        offset = stored.offset + self.first * columns * DTYPE_BYTES[stored.dtype]
        return replace(tensor, stored=replace(stored, shape=(self.n, columns), strides=strides, offset=offset))


class ExpertsCoding(Coding, Protocol):
    """The coding of a tensor [experts, out, columns of codes], of which rows can be taken."""

    def piece(self, rows: Rows, n_out: int) -> Coding:
        """Return the coding of some rows of one expert.

        Args:
            rows: of the flattened [experts * out, columns].
        """


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """One weight of the checkpoint, as a 16-bit checkpoint of the model has it, and the codes that hold it.

    Attributes:
        name: that of the 16-bit weight.
        codes: [out, columns of codes], or [experts, out, columns of codes].
        is_transposed: the 16-bit weight is [experts, in, out].
    """

    name: str
    codes: PlacedTensor
    coding: Coding
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.coding.weight_shape(self.codes.stored.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that it is made of."""
        return (self.codes.name, *(tensor.name for tensor in self.coding.beside))

    def piece(self, rows: Rows) -> tuple[StoredTensor, Coding]:
        """Return codes and coding of some rows of the flattened [experts * out, columns]; those of one expert."""
        coding: Any = self.coding
        return rows.of(self.codes).stored, coding.piece(rows, self.codes.stored.shape[-2])

    def whole(self) -> Coding:
        """Return the coding of the whole weight, in the shape that a 16-bit checkpoint has it in."""
        return self.coding if len(self.shape) == 2 else StackCoding(self)


@dataclass(frozen=True, slots=True)
class StackCoding:
    """The coding of the matrices of all experts, which stay one tensor. A row of it is one expert's matrix."""

    weight: CodedWeight
    rows_together = 1

    @property
    def beside(self) -> tuple[PlacedTensor, ...]:
        return self.weight.coding.beside

    def weight_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return (codes[0], *self.weight.shape[1:])

    def code_rows(self, begin: int, end: int) -> tuple[int, int]:
        return begin, end

    def identity(self) -> list[Any]:
        return [*self.weight.coding.identity(), self.weight.is_transposed]

    def open(self) -> _StackDecoder:
        return _StackDecoder(self.weight)


class _StackDecoder:
    def __init__(self, weight: CodedWeight) -> None:
        self._weight = weight

    def decode(self, codes: npt.NDArray[Any], first_row: int) -> npt.NDArray[np.float32]:
        n_out = self._weight.codes.stored.shape[-2]
        coding: Any = self._weight.coding
        decoded = np.empty((len(codes), *self._weight.shape[1:]), np.float32)
        for i, matrix in enumerate(codes):
            rows = Rows((first_row + i) * n_out, 1, n_out)
            values = coding.piece(rows, n_out).open().decode(matrix, 0)
            decoded[i] = values.T if self._weight.is_transposed else values
        return decoded


def weights_by_column(places: Places) -> Iterator[tuple[str, PlacedTensor, PlacedTensor, PlacedTensor]]:
    """Yield the module, `qweight`, `scales` and `qzeros` of each weight that GPTQ and AWQ store by columns.

    Raises:
        CorruptFileError: scales or zero points are missing.
    """
    for name, codes in places.items():
        if name.endswith(".qweight") and codes.stored.dtype == "I32":
            module = name.removesuffix(".qweight")
            scale, zeros = places.get(f"{module}.scales"), places.get(f"{module}.qzeros")
            if scale is None or zeros is None:
                raise misfit(codes.stored, codes.stored, f"{module}.scales and {module}.qzeros beside it")
            yield module, codes, scale, zeros


def matrix_at(tensor: PlacedTensor, index: int) -> PlacedTensor:
    """Return one matrix of a contiguous tensor [n, rows, columns] as a view."""
    rows = tensor.stored.shape[-2]
    return Rows(index * rows, 1, rows).of(tensor)


def element_at(tensor: PlacedTensor, index: int) -> PlacedTensor:
    """Return one element of a contiguous tensor as a view []."""
    stored = tensor.stored
    offset = stored.offset + index * DTYPE_BYTES[stored.dtype]
    return replace(tensor, stored=replace(stored, shape=(), strides=None, offset=offset))


def flattened(tensor: PlacedTensor, n_dimensions: int) -> PlacedTensor:
    """Return a contiguous tensor whose last dimensions are joined, so that `n_dimensions` are left."""
    shape = tensor.stored.shape
    joined = (*shape[: n_dimensions - 1], prod(shape[n_dimensions - 1 :]))
    return replace(tensor, stored=replace(tensor.stored, shape=joined, strides=None))


def is_contiguous(tensor: PlacedTensor) -> bool:
    strides = tensor.stored.strides
    return strides is None or strides == contiguous_strides(tensor.stored.shape)


def quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization block of a config.json, which some models have in `text_config`; {} without one."""
    for place in (config, config.get("text_config")):
        block = place.get("quantization_config") if isinstance(place, dict) else None
        if isinstance(block, dict):
            return block
    return {}


def misfit(scale: StoredTensor, weight: StoredTensor, expected: str) -> CorruptFileError:
    """Return the error for a scale, or another tensor beside codes, that does not fit them."""
    return CorruptFileError(
        f"{quoted(scale.name)}, {scale.dtype} {list(scale.shape)}, is no scale for {quoted(weight.name)}, "
        f"{weight.dtype} {list(weight.shape)}: expected {expected}",
        REFETCH,
    )
