"""One tensor as it lies in a file, whatever the file's format: the form in which the rest of int8convert sees it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element, by the safetensors name of the dtype. The formats narrower than a byte are not read."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's elements are.

    Attributes:
        name: the full key.
        dtype: its safetensors name, a key of `DTYPE_BYTES`.
        shape: as the model sees it.
        offset: bytes from the start of the file to the element at index 0, 0, ...
        strides: in elements, one a dimension; None for the ordinary contiguous row-major layout.
        storage: which storage of a pickle it views; tensors that share one may be tied. None in safetensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    storage: int | None = None

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the contiguous tensor, which is what is written; what is read of a strided one may differ."""
        return self.n_elements * DTYPE_BYTES[self.dtype]

    @property
    def span_bytes(self) -> int:
        """Bytes from the first to behind the last element in the file."""
        if self.strides is None or self.n_elements == 0:
            return self.n_bytes
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPE_BYTES[self.dtype]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of a shape, in elements."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
