"""Pickles and zip archives put together by hand, for what no pickler and no archiver would write.

A pickle is a list of opcodes, so its parts are bytes to be joined; `pickletools.dis` shows what was made.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from tests.tools.attacks.registry import CANARY

COMMAND = f"touch {CANARY}"
MAGIC = 0x1950A86A20F9469CFC6C
"""What a file of torch from before 1.6 begins with."""


def global_(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def push(value: Any) -> bytes:
    """The opcodes that put a plain value on the stack, of the protocol torch writes."""
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(encoded)]) + encoded
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            encoded = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(encoded)) + encoded
        case bytes():
            return value  # opcodes already
        case tuple():
            return b"(" + b"".join(map(push, value)) + b"t"
        case list():
            return b"](" + b"".join(map(push, value)) + b"e"
        case dict():
            return b"}(" + b"".join(push(k) + push(v) for k, v in value.items()) + b"u"
        case None:
            return b"N"
    raise TypeError(type(value))


def call(module: str, name: str, *arguments: Any) -> bytes:
    return global_(module, name) + push(arguments) + b"R"


def storage(key: Any = "0", n_elements: Any = 16, kind: str = "HalfStorage", location: Any = "cpu") -> bytes:
    """A storage by its persistent id."""
    return push(("storage", global_("torch", kind), key, location, n_elements)) + b"Q"


def tensor(
    shape: Any = (4, 4), strides: Any = (4, 1), offset: Any = 0, of: bytes | None = None, rebuild: str | None = None
) -> bytes:
    """A tensor that views a storage."""
    hooks = call("collections", "OrderedDict")
    place = storage() if of is None else of
    return call("torch._utils", rebuild or "_rebuild_tensor_v2", place, offset, shape, strides, False, hooks)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + push(value) + b"."


@dataclass
class Record:
    """One file of a zip archive, with what its headers claim; None: the truth."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    local_name: str | None = None
    local_offset: int | None = None
    local_signature: bytes = b"PK\x03\x04"
    local_extra: bytes | None = None


def zip_archive(records: list[Record], claimed_directory_offset: int | None = None) -> bytes:
    """A zip archive whose records may lie."""
    content, directory = bytearray(), bytearray()
    for record in records:
        begin = len(content) if record.local_offset is None else record.local_offset
        name = record.name.encode()
        local_name = name if record.local_name is None else record.local_name.encode()
        stored = record.data if record.method == 0 else _deflate(record.data)
        size = len(record.data) if record.size is None else record.size
        stored_size = len(stored) if record.size is None or record.method else record.size
        extra = _padding(len(content) + 30 + len(local_name)) if record.local_extra is None else record.local_extra
        crc = zlib.crc32(record.data)
        sizes = struct.pack("<III", crc, min(stored_size, 2**32 - 1), min(size, 2**32 - 1))
        kind = struct.pack("<HHHH", record.flags, record.method, 0, 0x21)
        lengths = struct.pack("<HH", len(local_name), len(extra))
        content += record.local_signature + struct.pack("<H", 20) + kind + sizes + lengths + local_name + extra + stored
        wide = b"" if size < 2**32 else struct.pack("<HHQQ", 1, 16, size, stored_size)
        directory += b"PK\x01\x02" + struct.pack("<HH", 20, 20) + kind + sizes
        directory += struct.pack("<HHHHHII", len(name), len(wide), 0, 0, 0, 0, begin) + name + wide
    at = len(content) if claimed_directory_offset is None else claimed_directory_offset
    n = len(records)
    return bytes(content + directory) + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, n, n, len(directory), at, 0)


def _deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return encoder.compress(data) + encoder.flush()


def _padding(at: int) -> bytes:
    """An extra field that puts the data at a multiple of 64, as torch does."""
    n = -(at + 4) % 64
    return b"FB" + struct.pack("<H", n) + b"Z" * n


def torch_records(pickle: bytes, storages: dict[str, bytes] | None = None) -> list[Record]:
    """The records of a file as torch.save writes it."""
    found = {"0": bytes(32)} if storages is None else storages
    return [
        Record("archive/data.pkl", pickle),
        Record("archive/byteorder", b"little"),
        *(Record(f"archive/data/{key}", data) for key, data in found.items()),
        Record("archive/version", b"3\n"),
    ]


def torch_file(value: Any, storages: dict[str, bytes] | None = None) -> bytes:
    """A file as torch.save writes it, of a value or of the opcodes of one."""
    return zip_archive(torch_records(pickled(value), storages))


def legacy_file(value: Any, storages: dict[str, tuple[int, bytes]] | None = None, keys: Any = None) -> bytes:
    """A file as torch before 1.6 wrote it.

    Args:
        storages: key -> (elements claimed, bytes), in the order of the file.
        keys: the list of keys behind the pickle; by default the true one.
    """
    found = {"0": (16, bytes(32))} if storages is None else storages
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = pickled(MAGIC) + pickled(1001) + pickled(system)
    listed = list(found) if keys is None else keys
    data = b"".join(struct.pack("<q", n) + content for n, content in found.values())
    return head + pickled(value) + pickled(listed) + data


def legacy_storage(key: str = "0", n_elements: Any = 16, view: Any = None, kind: str = "HalfStorage") -> bytes:
    """A storage by its persistent id in the old format, whose last entry describes a view of another."""
    return push(("storage", global_("torch", kind), key, "cpu", n_elements, view)) + b"Q"
