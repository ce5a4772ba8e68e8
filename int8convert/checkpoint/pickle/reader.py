"""A `pytorch_model*.bin` shard: where its tensors' bytes are, without running or importing anything it names.

1. Find the pickle: a record of a zip archive, or, as torch wrote before 1.6, the beginning of the file.
2. Read it into a dictionary of names and tensor descriptions (`unpickler`).
3. Check each description against the bytes that are there, and say where they are; they are read in blocks like any
   other shard's.

What it costs: the pickle, not the weights, at most `MAX_PICKLE_BYTES` of it; no torch. What is refused: anything but a
flat dictionary of dense tensors, and the formats of torch before 0.1.10 (tar archives).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from int8convert.checkpoint.names import POINTER_START_BYTES, open_regular, refuse_pointer
from int8convert.checkpoint.pickle.machine import Unpickler
from int8convert.checkpoint.pickle.values import MAX_PICKLE_BYTES, Dictionary, RefusedError, Storage, Tensor, kind_of
from int8convert.checkpoint.pickle.zip import ZipArchive
from int8convert.checkpoint.stored_tensor import (
    DTYPE_BYTES,
    StoredTensor,
    check_tensor_name,
    contiguous_strides,
    is_size,
)
from int8convert.errors import CorruptFileError
from int8convert.text import quoted

MAX_STRIDED_BYTES = 16_000_000_000
"""Bytes of the largest strided tensor, including the bytes between its elements. Making it contiguous takes both.
Twice the largest head there is. A sparse file, which takes no room on the disk, could ask for a terabyte."""

_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A pickle of torch's magic number."""

Places = Callable[[Storage], tuple[int, int]]
"""Offset of a storage's bytes in the file, and their number."""


def read_pickle_header(path: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a local file; see `find_pickle_tensors`."""
    with open(open_regular(path), "rb") as file:
        return find_pickle_tensors(file, os.fstat(file.fileno()).st_size, path.name)


def find_pickle_tensors(
    file: BinaryIO, file_bytes: int, file_name: str, is_remote: bool = False
) -> tuple[StoredTensor, ...]:
    """Return the tensors of a `.bin` shard, in the order of their bytes, from its directory and pickle alone.

    Args:
        is_remote: whether each read costs a request; the fewest places are then read.

    Raises:
        CorruptFileError: not a pickle of plain tensors, or one that asks to run code.
    """
    start = file.read(POINTER_START_BYTES)
    refuse_pointer(start, file_name)
    try:
        is_zip = start.startswith(b"PK\x03\x04")  # as torch tells them apart
        entries, data = _read_zip(file, file_bytes, is_remote) if is_zip else _read_legacy(file, file_bytes)
        tensors = [
            replace(_describe(name, tensor, data, file_bytes), rank=rank)
            for rank, (name, tensor) in enumerate(entries.items())
        ]
    except RefusedError as refused:
        raise CorruptFileError(
            f"{quoted(file_name)} cannot be read as a weights-only pickle: {refused}",
            "nothing of it was run or written; fetch the file again, or use a safetensors version of the checkpoint",
        ) from None
    for tensor in tensors:
        check_tensor_name(tensor.name, file_name)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)))


def _state_dict(value: Any) -> dict[str, Tensor]:
    """Return the tensors by name, if a pickle holds such a dictionary."""
    if not isinstance(value, Dictionary):
        raise RefusedError(f"it holds {kind_of(value)}, not a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for entry in value.entries:
        match entry:
            case [str(name), Tensor() as tensor]:
                if name in tensors:
                    raise RefusedError(f"the entry {quoted(name)} occurs twice")
                tensors[name] = tensor
            case [str(name), other]:
                raise RefusedError(f"the entry {quoted(name)} is {kind_of(other)}, not a tensor")
            case [other, _]:
                shown = f"{other} " if type(other) is int and is_size(other) else ""
                raise RefusedError(f"the entry {shown}is named by {kind_of(other)}, not by a string")
            case _:
                raise RefusedError(f"it holds a dictionary made of {kind_of(entry)}")
    return tensors


def _describe(name: str, tensor: Tensor, data: Places, file_bytes: int) -> StoredTensor:
    begin, n_bytes = data(tensor.storage)
    if tensor.storage.n_bytes != n_bytes:
        raise RefusedError(
            f"{quoted(name)} claims a storage of {tensor.storage.n_bytes:,} bytes, there are {n_bytes:,}"
        )
    item_bytes = DTYPE_BYTES[tensor.dtype]
    n_elements = prod(tensor.shape)
    if n_elements == 0:
        return StoredTensor(name, tensor.dtype, tensor.shape, begin, None, begin)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * item_bytes > n_bytes:
        raise RefusedError(f"{quoted(name)} reaches beyond its storage")
    if n_elements * item_bytes > file_bytes:
        # Strides of zero repeat elements: without a bound, a file of a kilobyte could promise a tensor of exabytes.
        raise RefusedError(f"{quoted(name)} repeats its elements until it is larger than the file")
    is_contiguous = all(
        stride == expected
        for n, stride, expected in zip(tensor.shape, tensor.strides, contiguous_strides(tensor.shape), strict=True)
        if n > 1
    )
    strides = None if is_contiguous else tensor.strides
    stored = StoredTensor(name, tensor.dtype, tensor.shape, begin + tensor.offset * item_bytes, strides, begin)
    if not is_contiguous and max(stored.n_bytes, stored.span_bytes) > MAX_STRIDED_BYTES:
        raise RefusedError(
            f"{quoted(name)} is no plain run of bytes and lies among {max(stored.n_bytes, stored.span_bytes):,}, "
            f"expected at most {MAX_STRIDED_BYTES:,}"
        )
    return stored


def _read_legacy(file: BinaryIO, file_bytes: int) -> tuple[dict[str, Tensor], Places]:
    """The format before torch 1.6: five pickles, then each storage as its number of elements and its bytes."""
    file.seek(0)
    head = file.read(min(file_bytes, MAX_PICKLE_BYTES))
    if not head.startswith(_LEGACY_START):
        raise RefusedError("it is neither a zip archive nor a file of torch before 1.6")
    unpickler = Unpickler(head, len(_LEGACY_START))
    if unpickler.load() != 1001:
        raise RefusedError("it is of an unknown version of the format before torch 1.6")
    unpickler.load()  # sizes of C types on the machine that wrote it, which torch does not look at either
    state_dict = _state_dict(unpickler.load())
    keys = unpickler.load()
    if not isinstance(keys, list):
        raise RefusedError("the list of its storages is missing")
    item_bytes = {key: DTYPE_BYTES[storage.dtype] for key, storage in unpickler.storages.items()}
    places: dict[str, tuple[int, int]] = {}
    at = unpickler.at
    for key in keys:
        if not isinstance(key, str) or key not in item_bytes or key in places:
            raise RefusedError("the list of its storages does not match its tensors")
        file.seek(at)
        n_bytes = int.from_bytes(file.read(8), "little") * item_bytes[key]
        if at + 8 + n_bytes > file_bytes:
            raise RefusedError(f"the storage {quoted(key, 40)} is truncated")
        places[key] = (at + 8, n_bytes)
        at += 8 + n_bytes

    def data(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise RefusedError(f"the storage {quoted(storage.key, 40)} has no bytes")
        return places[storage.key]

    return state_dict, data


def _read_zip(file: BinaryIO, file_bytes: int, is_remote: bool) -> tuple[dict[str, Tensor], Places]:
    """The format since torch 1.6: an uncompressed zip archive of a pickle and a record for each storage."""
    archive = ZipArchive(file, file_bytes)
    find = archive.find_unread if is_remote else archive.find
    if archive.has("constants.pkl"):
        raise RefusedError("it is a TorchScript program, not a state dict")
    if archive.has("byteorder") and archive.read("byteorder", 16) != b"little":
        raise RefusedError("its numbers are not in little-endian byte order")
    unpickler = Unpickler(archive.read("data.pkl", MAX_PICKLE_BYTES))
    state_dict = _state_dict(unpickler.load())
    places = {key: find(f"data/{key}") for key in {tensor.storage.key for tensor in state_dict.values()}}
    ends = 0
    for begin, n_bytes in sorted(places.values()):
        if begin < ends:
            raise RefusedError("two of its storages overlap in the file")
        ends = begin + n_bytes
    return state_dict, lambda storage: places[storage.key]
