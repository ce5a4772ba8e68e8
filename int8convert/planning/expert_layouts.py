"""Finds the matrices in a tensor that holds all experts of a mixture-of-experts layer.

Such a tensor holds one or two projections of all experts: gate and up one after the other or interleaved, each as [out,
in] or [in, out]. Every projection of every expert becomes a view of it, an ordinary [out, in] matrix under the name
that loaders of int8 experts look for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor, contiguous_strides


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The content of a fused tensor.

    Attributes:
        module: the experts' module in the output: model.layers.0.mlp.experts.
        projections: the projections of each expert: ("gate_proj", "up_proj").
        leaf: "weight": [experts, rows, columns], or [experts * rows, columns]; or "bias": [experts, rows].
        is_transposed: matrices are stored as [in, out].
        is_interleaved: output i belongs to projection i modulo their number; else the projections are contiguous.
    """

    module: str
    projections: tuple[str, ...]
    leaf: str
    n_experts: int
    is_transposed: bool
    is_interleaved: bool

    def output_name(self, expert: int, projection: str) -> str:
        return f"{self.module}.{expert}.{projection}.{self.leaf}"


def fits(layout: ExpertLayout, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape can be split into matrices that are not empty."""
    n_dimensions = 2 if layout.leaf == "bias" else 3
    if len(shape) == n_dimensions - 1 and shape[0] % layout.n_experts == 0:
        shape = (layout.n_experts, shape[0] // layout.n_experts, *shape[1:])
    if len(shape) != n_dimensions or shape[0] != layout.n_experts or min(shape) == 0:
        return False
    n_out = shape[-1] if layout.is_transposed or layout.leaf == "bias" else shape[1]
    return n_out % len(layout.projections) == 0


def split(layout: ExpertLayout, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Yield output name and view of each matrix or bias, in the order of the file's bytes as far as there is one."""
    shape, strides = stored.shape, stored.strides or contiguous_strides(stored.shape)
    if shape[0] != layout.n_experts:
        n_rows = shape[0] // layout.n_experts
        shape, strides = (layout.n_experts, n_rows, *shape[1:]), (strides[0] * n_rows, *strides)
    out_axis = len(shape) - 1 if layout.is_transposed or layout.leaf == "bias" else 1
    n = len(layout.projections)
    n_out = shape[out_axis] // n
    for expert in range(layout.n_experts):
        for i, projection in enumerate(layout.projections):
            first = expert * strides[0] + i * strides[out_axis] * (1 if layout.is_interleaved else n_out)
            piece_shape = [*shape[1:]]
            piece_strides = [*strides[1:]]
            piece_shape[out_axis - 1] = n_out
            piece_strides[out_axis - 1] *= n if layout.is_interleaved else 1
            if layout.is_transposed and layout.leaf == "weight":
                piece_shape.reverse()
                piece_strides.reverse()
            yield (
                layout.output_name(expert, projection),
                _view(stored, first, tuple(piece_shape), tuple(piece_strides)),
            )


def _view(stored: StoredTensor, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> StoredTensor:
    is_contiguous = strides == contiguous_strides(shape) or prod(shape) <= 1
    offset = stored.offset + first * DTYPE_BYTES[stored.dtype]
    return replace(stored, offset=offset, shape=shape, strides=None if is_contiguous else strides)
