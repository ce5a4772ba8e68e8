"""A safetensors header, read and checked without touching the data behind it.

Layout: 8 bytes little-endian header length N, N bytes of JSON, the tensors' bytes without holes or overlap.
Source: https://huggingface.co/docs/safetensors (format).

We parse it ourselves because the answer wanted is where the bytes are, to read them in blocks, and because every
promise is checked against the file's size before anything is believed.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.errors import CorruptFileError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_REFETCH = "fetch this file again and rerun the same command; nothing was written from it"


def read_safetensors_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a file, in the order of their bytes.

    Reads the header alone. Does not know whether the data is what somebody meant to store.

    Raises:
        CorruptFileError: the header contradicts itself or the file's size.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little") if file_bytes >= 8 else 0
        if not 2 <= n_header <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CorruptFileError(
                f"'{path.name}' is no safetensors file: its header would take {n_header:,} bytes, "
                f"the file has {file_bytes:,}",
                _REFETCH,
            )
        header_json = file.read(n_header)
    entries = _parse_header(header_json, path.name)
    tensors = [_stored_tensor(name, entry, 8 + n_header, path.name) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    _check_tiling(tensors, 8 + n_header, file_bytes, path.name)
    return tuple(tensors)


def _parse_header(header_json: bytes, file_name: str) -> dict[str, Any]:
    try:
        header = json.loads(header_json, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"the header of '{file_name}' is not valid JSON: {error}", _REFETCH) from None
    if not isinstance(header, dict):
        raise CorruptFileError(
            f"the header of '{file_name}' is a JSON {type(header).__name__}, not an object", _REFETCH
        )
    header.pop("__metadata__", None)
    return header


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return entries


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _stored_tensor(name: str, entry: Any, data_start: int, file_name: str) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            pass
        case _:
            raise CorruptFileError(
                f"the header of '{file_name}' describes {name!r} without dtype, shape and data_offsets", _REFETCH
            )
    if dtype not in DTYPE_BYTES:
        raise CorruptFileError(
            f"{name!r} in '{file_name}' has dtype {dtype[:40]!r}, which int8convert cannot read",
            f"known dtypes: {', '.join(DTYPE_BYTES)}; nothing was written",
        )
    if not all(map(_is_size, (*shape, begin, end))) or end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise CorruptFileError(
            f"{name!r} in '{file_name}' has shape {shape} of {dtype}, which does not fill its bytes {begin}-{end}",
            _REFETCH,
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + begin)


def _check_tiling(tensors: list[StoredTensor], data_start: int, file_bytes: int, file_name: str) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    at = data_start
    for tensor in tensors:
        if tensor.offset != at:
            raise CorruptFileError(
                f"{tensor.name!r} in '{file_name}' starts at byte {tensor.offset - data_start:,} of the data, "
                f"expected {at - data_start:,}: tensors overlap or leave a hole",
                _REFETCH,
            )
        at += tensor.n_bytes
    if at != file_bytes:
        kind = "truncated" if at > file_bytes else "too long"
        raise CorruptFileError(
            f"'{file_name}' is {kind}: its header promises {at:,} bytes, the file has {file_bytes:,}", _REFETCH
        )


def encode_safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The bytes in front of the data, for tensors laid one behind the other in the order given.

    Args:
        tensors: name -> (dtype, shape).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def read_exactly(fd: int, buffer: memoryview, offset: int, file_name: str) -> None:
    """Fill the buffer from the file, or say that the file has shrunk since its header was read."""
    done = 0
    while done < len(buffer):
        n = os.preadv(fd, [buffer[done:]], offset + done)
        if n == 0:
            raise CorruptFileError(
                f"'{file_name}' ends at byte {offset + done:,}, it was longer when the conversion began",
                "leave the source alone while it is read, and rerun the same command",
            )
        done += n
