"""One tensor in a file of any format, as the rest of int8convert sees it.

Names and shapes come from strangers. `check_tensor_name` and `is_shape` find what no model has and what would do harm
further on: in a terminal, in a file name made of a tensor's name, in arithmetic on sizes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from int8convert.errors import CorruptFileError
from int8convert.text import quoted

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

MAX_DIMENSIONS = 64
"""Most dimensions that NumPy can hold. Checked before they are multiplied: the product of a million takes hours."""

MAX_NAME_LENGTH = 500
"""Characters of a tensor's name. Real ones have under 200."""

_MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor's elements in a file.

    Attributes:
        dtype: its safetensors name, a key of `DTYPE_BYTES`.
        shape: as the model sees it.
        offset: bytes from the start of the file to the element at index 0, 0, ...
        strides: in elements, one a dimension; None for the ordinary contiguous row-major layout.
        storage: which storage of a pickle it views; tensors that share one may be tied. None in safetensors.
        rank: its place in the order of a pickle's entries. 0 in safetensors, which loaders list by name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    storage: int | None = None
    rank: int = field(default=0, compare=False)

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of the contiguous tensor, as it is written. Reading a strided one may take more."""
        return self.n_elements * DTYPE_BYTES[self.dtype]

    @property
    def span_bytes(self) -> int:
        """Bytes in the file from the first element to the end of the last."""
        if self.strides is None or self.n_elements == 0:
            return self.n_bytes
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPE_BYTES[self.dtype]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the row-major strides of a shape, in elements."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def is_size(value: Any) -> bool:
    """Return whether a value is an integer that can count bytes or elements; True and 3.0 are not."""
    return type(value) is int and 0 <= value <= _MAX_SIZE


def is_shape(shape: Sequence[Any], dtype: str) -> bool:
    """Return whether 63 bits can count the bytes of a tensor of this shape, empty dimensions ignored."""
    return (
        len(shape) <= MAX_DIMENSIONS
        and all(map(is_size, shape))
        and prod(n for n in shape if n > 0) * DTYPE_BYTES[dtype] <= _MAX_SIZE
    )


def check_tensor_name(name: str, file_name: str) -> None:
    """Refuse a name that no model gives.

    Control characters would act on the terminal that prints them, and loaders that put weights on the disk make a file
    name of a tensor's: `../x` would lie outside of their folder.

    Raises:
        CorruptFileError: it is empty, absurdly long, holds what cannot be printed, reads as a path out of a folder,
            or means something else in the output.
    """
    if not name:
        reason = "is empty"
    elif len(name) > MAX_NAME_LENGTH:
        reason = f"has {len(name):,} characters, expected at most {MAX_NAME_LENGTH}"
    elif not name.isprintable():
        reason = "holds characters that cannot be printed"
    elif name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        reason = "is a path that leaves its folder"
    elif name == "__metadata__":  # in a `.bin` file it could be a tensor; in the header to be written it is none
        reason = "is no tensor's in a safetensors file"
    else:
        return
    raise CorruptFileError(
        f"the tensor name {quoted(name)} in {quoted(file_name)} {reason}",
        "no model has a tensor of that name; fetch the file again, from a source you trust",
    )
