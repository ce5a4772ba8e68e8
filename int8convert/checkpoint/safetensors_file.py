"""Safetensors headers: read, checked and written without touching the data after them.

Layout: 8 bytes little-endian header length N, N bytes of JSON, the tensors' bytes without holes or overlap.
Source: https://huggingface.co/docs/safetensors (format).

We parse it ourselves because the answer wanted is where the bytes are, to read them in blocks, and because every
promise is checked against the file's size before anything is believed. Nothing is accepted that the safetensors
library refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from int8convert.checkpoint.json_file import parse_json_object
from int8convert.checkpoint.names import POINTER_START_BYTES, open_regular, refuse_pointer
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor, check_tensor_name, is_shape, is_size
from int8convert.errors import CorruptFileError
from int8convert.text import quoted
from int8convert.trace import span

METADATA_NAME = "__metadata__"
"""Key of the header's one entry that is not a tensor."""

MAX_HEADER_BYTES = 32_000_000
"""A header of 100,000 tensors takes 12 MB. The safetensors library stops at 100 MB, but parsed into Python objects that
could be 3 GB."""

_REFETCH = "fetch this file again and rerun the same command"


def read_safetensors_header(path: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a local file; see `find_safetensors_tensors`."""
    with open(open_regular(path), "rb") as file:
        return find_safetensors_tensors(file, os.fstat(file.fileno()).st_size, path.name)


def find_safetensors_tensors(file: BinaryIO, file_bytes: int, file_name: str) -> tuple[StoredTensor, ...]:
    """Return the tensors of a file, in the order of their bytes.

    Reads the header alone. Does not know whether the data is what somebody meant to store.

    Raises:
        CorruptFileError: the header contradicts itself or the file's size.
    """
    return parse_safetensors_header(_read_header_json(file, file_bytes, file_name), file_bytes, file_name)


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file whose header has been checked before."""
    with open(open_regular(path), "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_json = _read_header_json(file, file_bytes, path.name)
    parse_safetensors_header(header_json, file_bytes, path.name)
    metadata: dict[str, str] = json.loads(header_json).get(METADATA_NAME) or {}
    return metadata


def _read_header_json(file: BinaryIO, file_bytes: int, file_name: str) -> bytes:
    refuse_pointer(file.read(POINTER_START_BYTES), file_name)
    file.seek(0)
    n_header = int.from_bytes(file.read(8), "little") if file_bytes >= 8 else 0
    if not 2 <= n_header <= file_bytes - 8:
        raise CorruptFileError(
            f"{quoted(file_name)} is no safetensors file, or truncated: its header would take {n_header:,} bytes, "
            f"the file has {file_bytes:,}",
            _REFETCH,
        )
    if n_header > MAX_HEADER_BYTES:
        raise CorruptFileError(
            f"the header of {quoted(file_name)} takes {n_header:,} bytes, expected at most {MAX_HEADER_BYTES:,}",
            "fetch the file again; no model has that many tensors in one file",
        )
    return file.read(n_header)


def parse_safetensors_header(header_json: bytes, file_bytes: int, file_name: str) -> tuple[StoredTensor, ...]:
    """Return the tensors of a file, from the JSON of its header.

    Args:
        header_json: what stands between the 8 bytes of length and the data.

    Raises:
        CorruptFileError: the header contradicts itself or the file's size.
    """
    what = f"the header of {quoted(file_name)}"
    # Without a minus every integer is one to the safetensors library too, and json's own conversion is the fast one.
    parse_int = _refuse_minus_zero if b"-0" in header_json else int
    header = parse_json_object(header_json, what, _REFETCH, parse_int=parse_int)
    if not header_json.startswith(b"{"):
        raise CorruptFileError(f"{what} does not begin with '{{'", _REFETCH)
    if not _is_string_map(header.pop(METADATA_NAME, None)):
        raise CorruptFileError(f"{what} has a __metadata__ that does not map strings to strings", _REFETCH)
    data_start = 8 + len(header_json)
    tensors = [_stored_tensor(name, entry, data_start, file_name) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    _check_tiling(tensors, data_start, file_bytes, file_name)
    return tuple(tensors)


def _refuse_minus_zero(digits: str) -> int:
    if digits == "-0":  # a float to the safetensors library, and no size
        raise ValueError("-0 is no size")
    return int(digits)


def _is_string_map(metadata: Any) -> bool:
    return metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))


def _stored_tensor(name: str, entry: Any, data_start: int, file_name: str) -> StoredTensor:
    check_tensor_name(name, file_name)
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            pass
        case _:
            raise CorruptFileError(
                f"the header of {quoted(file_name)} describes {quoted(name)} without dtype, shape and data_offsets",
                _REFETCH,
            )
    if len(entry) > 3:  # a field unknown here could change what the bytes mean
        extra = next(key for key in entry if key not in ("dtype", "shape", "data_offsets"))
        raise CorruptFileError(
            f"the header of {quoted(file_name)} gives {quoted(name)} a field {quoted(extra, 40)}, "
            "which the format does not have",
            _REFETCH,
        )
    if dtype not in DTYPE_BYTES:
        raise CorruptFileError(
            f"{quoted(name)} in {quoted(file_name)} has dtype {quoted(dtype, 40)}, which int8convert cannot read",
            f"known dtypes: {', '.join(DTYPE_BYTES)}",
        )
    if (
        not is_shape(shape, dtype)
        or not is_size(begin)
        or not is_size(end)
        or end - begin != prod(shape) * DTYPE_BYTES[dtype]
    ):
        raise CorruptFileError(
            f"{quoted(name)} in {quoted(file_name)} has shape [{_shown(shape)}] of {dtype}, which does not fill its "
            f"bytes [{_shown([begin, end])}]",
            _REFETCH,
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + begin)


def _shown(sizes: Sequence[Any]) -> str:
    """Return a few short numbers for an error; of other values, their type."""
    shown = [f"{n}"[:20] if isinstance(n, int | float) else f"a {type(n).__name__}" for n in sizes[:6]]
    return ", ".join(shown) + (f", ... {len(sizes):,} in all" if len(sizes) > 6 else "")


def _check_tiling(tensors: list[StoredTensor], data_start: int, file_bytes: int, file_name: str) -> None:
    """Check that every byte after the header belongs to exactly one tensor."""
    at = data_start
    for tensor in tensors:
        if tensor.offset != at:
            raise CorruptFileError(
                f"{quoted(tensor.name)} in {quoted(file_name)} starts at byte {tensor.offset - data_start:,} of the "
                f"data, expected {at - data_start:,}: tensors overlap or leave a hole",
                _REFETCH,
            )
        at += tensor.n_bytes
    if at != file_bytes:
        kind = "truncated" if at > file_bytes else "too long"
        raise CorruptFileError(
            f"{quoted(file_name)} is {kind}: its header promises {at:,} bytes, the file has {file_bytes:,}", _REFETCH
        )


class FileMetadata(tuple[str, tuple[int, ...]]):
    """What a header says of the file as a whole, as the entry `METADATA_NAME` among its tensors.

    It stands where (dtype, shape) of a tensor would, and counts as one of no bytes, so code that plans or writes a
    file needs no special case. No tensor can have that name.
    """

    entries: Mapping[str, str]

    def __new__(cls, entries: Mapping[str, str]) -> FileMetadata:
        made = super().__new__(cls, ("U8", (0,)))
        made.entries = entries
        return made


def encode_safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the bytes before the data, for tensors stored one after the other in the given order.

    Args:
        tensors: name -> (dtype, shape), or `FileMetadata`.
    """
    header: dict[str, Any] = {METADATA_NAME: {"format": "pt"}}
    at = 0
    for name, spec in tensors.items():
        if isinstance(spec, FileMetadata):
            header[METADATA_NAME] |= spec.entries
            continue
        dtype, shape = spec
        end = at + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def read_exactly(fd: int, buffer: memoryview, offset: int, file_name: str) -> None:
    """Fill the buffer from the file; raise a CorruptFileError if the file has shrunk."""
    done = 0
    while done < len(buffer):
        with span("read", len(buffer) - done):
            n = os.preadv(fd, [buffer[done:]], offset + done)
        if n == 0:
            raise CorruptFileError(
                f"{quoted(file_name)} ends at byte {offset + done:,}, it was longer when the conversion began",
                "leave the source alone while it is read, and rerun the same command",
            )
        done += n
