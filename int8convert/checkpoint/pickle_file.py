"""A `pytorch_model*.bin` shard: where its tensors' bytes are, without running or importing anything it names.

A pickle is a program. torch's weights-only loader runs it with few functions to call; that keeps the program from doing
what it likes, but not from taking memory and time: it may ask for a bytearray of a terabyte, or for the hash of a tuple
that holds itself forty levels deep. So the program is not run here but read: `_Unpickler` knows the operations
`torch.save` writes, and for each function that makes a tensor it writes down the arguments.

1. Find the pickle: a record of a zip archive, or, as torch wrote before 1.6, the beginning of the file.
2. Read it into a dictionary of names and tensor descriptions.
3. Check each description against the bytes that are there, and say where they are; they are read in blocks like any
   other shard's.

What it costs: the pickle, not the weights, at most `MAX_PICKLE_BYTES` of it; no torch. What is refused: anything but a
flat dictionary of dense tensors, and the formats of torch before 0.1.10 (tar archives).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from int8convert.checkpoint.layout import quoted
from int8convert.checkpoint.stored_tensor import (
    DTYPE_BYTES,
    StoredTensor,
    check_tensor_name,
    contiguous_strides,
    is_shape,
    is_size,
)
from int8convert.errors import CorruptFileError

MAX_PICKLE_BYTES = 32_000_000
"""A tensor takes about 130 bytes of pickle, so this is room for 200,000."""

MAX_OBJECTS = 2_000_000
"""Containers, entries, calls and marks of a pickle. A tensor takes 10; each costs up to 400 bytes of memory, for as few
as one of the file."""

MAX_ARGUMENTS = 16
"""torch's functions take up to 8. A tuple of millions, called with again and again, would be copied each time."""

MAX_STRIDED_BYTES = 16_000_000_000
"""Of a tensor that is no plain run of bytes, and of the bytes it lies among: making it one takes both in memory.
Twice the largest head there is. A sparse file, which takes no room on the disk, could ask for a terabyte."""

_STORAGES = {
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",
}
_DTYPES = {
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
}
"""Those that `torch.save` names beside an untyped storage."""

_UNSTORABLE = {
    "torch.ComplexDoubleStorage": "complex128",
    "torch.QInt8Storage": "qint8",
    "torch.QUInt8Storage": "quint8",
    "torch.QInt32Storage": "qint32",
    "torch.QUInt4x2Storage": "quint4x2",
    "torch.QUInt2x4Storage": "quint2x4",
    "torch.float8_e4m3fnuz": "float8_e4m3fnuz",
    "torch.float8_e5m2fnuz": "float8_e5m2fnuz",
    "torch.float4_e2m1fn_x2": "float4_e2m1fn_x2",
}
_NOT_DENSE = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in ("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage", "wrapper_subclass")
)
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A pickle of torch's magic number."""

_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})


class _RefusedError(Exception):
    """Why a file is refused; becomes a CorruptFileError with the file's name."""


def read_pickle_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a `.bin` shard, in the order of their bytes, from its directory and pickle alone.

    Raises:
        CorruptFileError: not a pickle of plain tensors, or one that asks to run code.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            is_zip = file.read(4) == b"PK\x03\x04"  # as torch tells them apart
            entries, data = (_read_zip if is_zip else _read_legacy)(file, file_bytes)
        tensors = [_describe(name, tensor, data, file_bytes) for name, tensor in entries.items()]
    except _RefusedError as refused:
        raise CorruptFileError(
            f"{quoted(path.name)} cannot be read as a weights-only pickle: {refused}",
            "nothing of it was run or written; fetch the file again, or use a safetensors version of the checkpoint",
        ) from None
    for tensor in tensors:
        check_tensor_name(tensor.name, path.name)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)))


# What the pickle describes.


@dataclass(frozen=True, slots=True)
class _Global:
    """Something the pickle names: module and attribute. Never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of bytes, by the key under which the file holds it."""

    key: str
    dtype: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Places = Callable[[_Storage], tuple[int, int]]
"""Where a storage's bytes begin in the file, and how many there are."""


class _Dictionary:
    """A dictionary as the list of its entries: a stranger's keys are not hashed, which could take for ever."""

    __slots__ = ("entries",)

    def __init__(self, entries: list[Any] | None = None) -> None:
        self.entries: list[Any] = [] if entries is None else entries


def _state_dict(value: Any) -> dict[str, _Tensor]:
    """The tensors by name, if that is what a pickle holds."""
    if not isinstance(value, _Dictionary):
        raise _RefusedError(f"it holds {_kind(value)}, not a dictionary of tensors")
    tensors: dict[str, _Tensor] = {}
    for entry in value.entries:
        match entry:
            case [str(name), _Tensor() as tensor]:
                if name in tensors:
                    raise _RefusedError(f"the entry {quoted(name)} occurs twice")
                tensors[name] = tensor
            case [str(name), other]:
                raise _RefusedError(f"the entry {quoted(name)} is {_kind(other)}, not a tensor")
            case [other, _]:
                shown = f"{other} " if type(other) is int and is_size(other) else ""
                raise _RefusedError(f"the entry {shown}is named by {_kind(other)}, not by a string")
            case _:
                raise _RefusedError(f"it holds a dictionary made of {_kind(entry)}")
    return tensors


def _kind(value: Any) -> str:
    names = {_Dictionary: "dict", _Storage: "storage", _Tensor: "tensor", _Global: "reference", str: "string"}
    return f"a {names.get(type(value), type(value).__name__)}"


def _describe(name: str, tensor: _Tensor, data: _Places, file_bytes: int) -> StoredTensor:
    begin, n_bytes = data(tensor.storage)
    if tensor.storage.n_bytes != n_bytes:
        raise _RefusedError(
            f"{quoted(name)} claims a storage of {tensor.storage.n_bytes:,} bytes, there are {n_bytes:,}"
        )
    item_bytes = DTYPE_BYTES[tensor.dtype]
    n_elements = prod(tensor.shape)
    if n_elements == 0:
        return StoredTensor(name, tensor.dtype, tensor.shape, begin, None, begin)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * item_bytes > n_bytes:
        raise _RefusedError(f"{quoted(name)} reaches beyond its storage")
    if n_elements * item_bytes > file_bytes:
        # Strides of zero repeat elements: without a bound, a file of a kilobyte could promise a tensor of exabytes.
        raise _RefusedError(f"{quoted(name)} repeats its elements until it is larger than the file")
    is_contiguous = all(
        stride == expected
        for n, stride, expected in zip(tensor.shape, tensor.strides, contiguous_strides(tensor.shape), strict=True)
        if n > 1
    )
    strides = None if is_contiguous else tensor.strides
    stored = StoredTensor(name, tensor.dtype, tensor.shape, begin + tensor.offset * item_bytes, strides, begin)
    if not is_contiguous and max(stored.n_bytes, stored.span_bytes) > MAX_STRIDED_BYTES:
        raise _RefusedError(
            f"{quoted(name)} is no plain run of bytes and lies among {max(stored.n_bytes, stored.span_bytes):,}, "
            f"expected at most {MAX_STRIDED_BYTES:,}"
        )
    return stored


# The two containers.


def _read_legacy(file: BinaryIO, file_bytes: int) -> tuple[dict[str, _Tensor], _Places]:
    """The format before torch 1.6: five pickles, then each storage as its number of elements and its bytes."""
    file.seek(0)
    head = file.read(min(file_bytes, MAX_PICKLE_BYTES))
    if not head.startswith(_LEGACY_START):
        raise _RefusedError("it is neither a zip archive nor a file of torch before 1.6")
    unpickler = _Unpickler(head, len(_LEGACY_START))
    if unpickler.load() != 1001:
        raise _RefusedError("it is of an unknown version of the format before torch 1.6")
    unpickler.load()  # sizes of C types on the machine that wrote it, which torch does not look at either
    state_dict = _state_dict(unpickler.load())
    keys = unpickler.load()
    if not isinstance(keys, list):
        raise _RefusedError("the list of its storages is missing")
    item_bytes = {key: DTYPE_BYTES[storage.dtype] for key, storage in unpickler.storages.items()}
    places: dict[str, tuple[int, int]] = {}
    at = unpickler.at
    for key in keys:
        if not isinstance(key, str) or key not in item_bytes or key in places:
            raise _RefusedError("the list of its storages does not match its tensors")
        file.seek(at)
        n_bytes = int.from_bytes(file.read(8), "little") * item_bytes[key]
        if at + 8 + n_bytes > file_bytes:
            raise _RefusedError(f"the storage {quoted(key, 40)} is truncated")
        places[key] = (at + 8, n_bytes)
        at += 8 + n_bytes

    def data(storage: _Storage) -> tuple[int, int]:
        if storage.key not in places:
            raise _RefusedError(f"the storage {quoted(storage.key, 40)} has no bytes")
        return places[storage.key]

    return state_dict, data


def _read_zip(file: BinaryIO, file_bytes: int) -> tuple[dict[str, _Tensor], _Places]:
    """The format since torch 1.6: an uncompressed zip archive of a pickle and a record for each storage."""
    archive = _ZipArchive(file, file_bytes)
    if archive.has("constants.pkl"):
        raise _RefusedError("it is a TorchScript program, not a state dict")
    if archive.has("byteorder") and archive.read("byteorder", 16) != b"little":
        raise _RefusedError("its numbers are not in little-endian byte order")
    unpickler = _Unpickler(archive.read("data.pkl", MAX_PICKLE_BYTES))
    state_dict = _state_dict(unpickler.load())
    places = {key: archive.find(f"data/{key}") for key in {tensor.storage.key for tensor in state_dict.values()}}
    ends = 0
    for begin, n_bytes in sorted(places.values()):
        if begin < ends:
            raise _RefusedError("two of its storages overlap in the file")
        ends = begin + n_bytes
    return state_dict, lambda storage: places[storage.key]


class _ZipArchive:
    """A zip archive as torch writes it: nothing compressed or encrypted, no comment at the end, no name twice.

    Stricter than the zipfile module, so that there is one way to read a file and no record can surprise.

    Source: .ZIP File Format Specification (APPNOTE 6.3), sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
    """

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        begin, n_bytes, n_records = self._find_directory(file_bytes)
        if n_bytes > MAX_PICKLE_BYTES:
            raise _RefusedError(f"its zip directory takes {n_bytes:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
        self._directory_begin = begin
        self._records: dict[bytes, tuple[int, int]] = {}
        directory = self._read_at(begin, n_bytes)
        at = 0
        while at < n_bytes:
            at = self._add_record(directory, at)
        if at != n_bytes or len(self._records) != n_records:
            raise _RefusedError("its zip directory is damaged")
        # torch, too, takes the folder of the first record for that of all.
        self._folder = next(iter(self._records), b"").partition(b"/")[0] + b"/"

    def _read_at(self, offset: int, n_bytes: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise _RefusedError("its zip directory is truncated")
        return data

    def _find_directory(self, file_bytes: int) -> tuple[int, int, int]:
        """Offset and size of the list of records, and their number."""
        end = file_bytes - 22
        signature, *_, n_records, n_bytes, begin, comment = struct.unpack("<4s4H2LH", self._read_at(max(0, end), 22))
        if signature != b"PK\5\6" or comment:
            raise _RefusedError("it does not end with a zip directory: truncated")
        if n_records == 0xFFFF or n_bytes == 0xFFFFFFFF or begin == 0xFFFFFFFF:
            signature, _, end, _ = struct.unpack("<4sLQL", self._read_at(max(0, end - 20), 20))
            if signature != b"PK\6\7" or end > file_bytes:
                raise _RefusedError("its zip directory is nowhere to be found")
            signature, *_, n_records, n_bytes, begin = struct.unpack("<4sQ2H2L4Q", self._read_at(end, 56))
            if signature != b"PK\6\6":
                raise _RefusedError("its zip directory is nowhere to be found")
        if begin + n_bytes > end:
            raise _RefusedError("its zip directory reaches beyond its end")
        return begin, n_bytes, n_records

    def _add_record(self, directory: bytes, at: int) -> int:
        """Take down the record whose entry begins at `at`; where the next begins."""
        fixed = directory[at : at + 46]
        if len(fixed) < 46 or fixed[:4] != b"PK\1\2":
            raise _RefusedError("its zip directory is damaged")
        flags, method = struct.unpack_from("<2H", fixed, 8)
        stored_bytes, n_bytes, n_name, n_extra, n_comment = struct.unpack_from("<2L3H", fixed, 20)
        header_at = int.from_bytes(fixed[42:46], "little")
        name = directory[at + 46 : at + 46 + n_name]
        extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
        if 0xFFFFFFFF in (stored_bytes, n_bytes, header_at):
            n_bytes, stored_bytes, header_at = _wide_numbers(extra, [n_bytes, stored_bytes, header_at])
        shown = quoted(name.decode(errors="replace"))
        if flags & 1 or method != 0 or stored_bytes != n_bytes or header_at + 30 + n_bytes > self._directory_begin:
            raise _RefusedError(f"the record {shown} is encrypted, compressed or truncated")
        if name in self._records:
            raise _RefusedError(f"the record {shown} occurs twice")
        self._records[name] = (header_at, n_bytes)
        return at + int(46 + n_name + n_extra + n_comment)

    def has(self, name: str) -> bool:
        return self._folder + name.encode(errors="replace") in self._records

    def find(self, name: str) -> tuple[int, int]:
        """Offset and size of a record's bytes."""
        full_name = self._folder + name.encode(errors="replace")
        if full_name not in self._records:
            raise _RefusedError(f"the record {quoted(name)} is not there")
        header_at, n_bytes = self._records[full_name]
        header = self._read_at(header_at, 30 + len(full_name))
        flags, method = struct.unpack_from("<2H", header, 6)
        n_name, n_extra = struct.unpack_from("<2H", header, 26)
        begin = header_at + 30 + n_name + n_extra
        if header[:4] != b"PK\3\4" or header[30:] != full_name or n_name != len(full_name) or flags & 1 or method != 0:
            raise _RefusedError(f"the record {quoted(name)} is not what the zip directory says")
        if begin + n_bytes > self._directory_begin:
            raise _RefusedError(f"the record {quoted(name)} is truncated")
        return begin, n_bytes

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of a small record."""
        begin, n_bytes = self.find(name)
        if n_bytes > max_bytes:
            raise _RefusedError(f"the record {quoted(name)} takes {n_bytes:,} bytes, expected at most {max_bytes:,}")
        return self._read_at(begin, n_bytes)


def _wide_numbers(extra: bytes, narrow: list[int]) -> list[int]:
    """Numbers of a zip entry, those that did not fit 32 bits taken from its extra field of kind 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, n_bytes = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + n_bytes]
            wide = iter([int.from_bytes(field[i : i + 8], "little") for i in range(0, len(field) - 7, 8)])
            numbers = [next(wide, -1) if number == 0xFFFFFFFF else number for number in narrow]
            if min(numbers) >= 0:
                return numbers
        at += 4 + n_bytes
    raise _RefusedError("its zip directory lacks a 64-bit number")


# The pickle itself.


class _Unpickler:
    """Reads pickles, one behind the other, and makes of them what they describe; calls and imports nothing.

    Knows the operations that `torch.save` writes in its own protocol, 2. Source: the pickletools module of Python.

    Attributes:
        at: where the next pickle begins.
        storages: key -> the first storage of that key that a pickle referred to.
    """

    def __init__(self, data: bytes, begin: int = 0) -> None:
        self._data = data
        self._n_objects = 0
        self.at = begin
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        """The value of the next pickle."""
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while True:
                code = self._take(1)[0]
                if code == _STOP:
                    if len(self._stack) != 1 or self._outer:
                        raise _RefusedError("its pickle ends with more or less than one value")
                    return self._stack.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise _RefusedError(f"it uses the pickle operation {bytes([code])!r}, which torch does not write")
                operation(self)
        except (IndexError, KeyError):  # of the stack and of the memo
            raise _RefusedError("its pickle takes what it has not put there") from None
        except UnicodeDecodeError:
            raise _RefusedError("its pickle holds text that is not UTF-8") from None

    def _take(self, n_bytes: int) -> bytes:
        taken = self._data[self.at : self.at + n_bytes]
        if len(taken) != n_bytes:
            raise _RefusedError("its pickle is truncated, or larger than any of a model's")
        self.at += n_bytes
        return taken

    def _take_number(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _take_line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 200)
        if end < 0:
            raise _RefusedError("its pickle is truncated, or names something absurdly long")
        line = self._data[self.at : end]
        self.at = end + 1
        return line.decode()

    def _count_objects(self, n: int) -> None:
        self._n_objects += n
        if self._n_objects > MAX_OBJECTS:
            raise _RefusedError(f"its pickle makes more than {MAX_OBJECTS:,} objects")

    def _push_new(self, value: Any) -> None:
        """Push something that takes memory of its own."""
        self._count_objects(1)
        self._stack.append(value)

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _mark(self) -> None:
        self._count_objects(1)
        self._outer.append(self._stack)
        self._stack = []

    def _push_tuple(self, n: int) -> None:
        items = tuple(self._stack.pop() for _ in range(n))
        self._push_new(items[::-1])

    def _push_marked_tuple(self) -> None:
        items = tuple(self._pop_to_mark())
        self._push_new(items)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise _RefusedError(f"its pickle appends to {_kind(target)}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, _Dictionary) or len(items) % 2:
            raise _RefusedError(f"its pickle sets entries of {_kind(target)}")
        self._count_objects(len(items) // 2)
        target.entries.extend(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _push_global(self) -> None:
        name = f"{self._take_line()}.{self._take_line()}"
        if name in _UNSTORABLE:
            raise _RefusedError(f"it holds a tensor of dtype {_UNSTORABLE[name]}, which a safetensors file cannot hold")
        if name in _NOT_DENSE:
            raise _RefusedError(f"it calls {name}, so what it holds is no dense tensor")
        if name not in _FUNCTIONS and name not in _STORAGES and name not in _DTYPES and name not in _CLASSES:
            raise _RefusedError(f"it asks for {quoted(name)}, which is no part of a plain tensor")
        self._stack.append(_Global(name))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._push_new(_call(self._stack.pop(), arguments))

    def _build(self) -> None:
        """Attributes set on an object, such as the `_metadata` of a state dict: of no use here."""
        self._stack.pop()
        if not isinstance(self._stack[-1], _Dictionary | _Tensor):
            raise _RefusedError(f"its pickle sets the state of {_kind(self._stack[-1])}")

    def _push_storage(self) -> None:
        match self._stack.pop():
            case ["storage", _Global(kind), str(key), str(), n, *rest] if (
                kind in _STORAGES and is_size(n) and rest in ([], [None])  # before torch 0.4, a part of another one
            ):
                dtype = _STORAGES[kind]
                storage = _Storage(key, dtype, n * DTYPE_BYTES[dtype])
                if self.storages.setdefault(key, storage) != storage:
                    raise _RefusedError(f"it refers to the storage {quoted(key, 40)} in two ways")
                self._push_new(storage)
            case _:
                raise _RefusedError("it refers to something that is no storage of numbers")


def _call(function: Any, arguments: Any) -> Any:
    """What a function of torch would make, described."""
    if not isinstance(function, _Global) or function.name not in _FUNCTIONS or type(arguments) is not tuple:
        raise _RefusedError(f"its pickle calls {_kind(function)} that is no function")
    if len(arguments) > MAX_ARGUMENTS:
        raise _wrong_arguments(function.name)
    return _FUNCTIONS[function.name](function.name, arguments)


def _wrong_arguments(name: str) -> _RefusedError:
    return _RefusedError(f"it calls {name} with arguments that describe no tensor")


def _make_dictionary(name: str, arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case ():
            return _Dictionary()
        case (list(entries),):  # as Python 2 wrote them; the list is shared, copies of copies could fill the memory
            return _Dictionary(entries)
    raise _wrong_arguments(name)


def _make_size(name: str, arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (tuple(sizes),):
            return sizes
    raise _wrong_arguments(name)


def _make_tensor(name: str, arguments: tuple[Any, ...]) -> Any:
    """Of `_rebuild_tensor(storage, offset, size, stride, ...)` in its three versions, as torch/_utils.py has them."""
    match arguments:
        case [_Storage() as storage, offset, tuple(shape), tuple(strides), *rest]:
            dtype = storage.dtype
        case _:
            raise _wrong_arguments(name)
    match name.removeprefix("torch._utils._rebuild_tensor"), rest:
        case "_v3", [_, _, _Global(dtype_name), *metadata] if dtype_name in _DTYPES:
            dtype = _DTYPES[dtype_name]
        case ("_v2", [_, _, *metadata]) | ("", [*metadata]):
            pass
        case _:
            raise _wrong_arguments(name)
    if metadata not in ([], [None]) and not (isinstance(metadata[0], _Dictionary) and not metadata[0].entries):
        raise _RefusedError("it holds a tensor marked as conjugate or negative, so its bytes are not its values")
    if (
        not is_shape(shape, dtype)
        or not is_size(offset)
        or len(strides) != len(shape)
        or not all(map(is_size, strides))
    ):
        raise _wrong_arguments(name)
    return _Tensor(storage, dtype, offset, shape, strides)


def _take_tensor(name: str, arguments: tuple[Any, ...]) -> Any:
    """Of `_rebuild_parameter(tensor, requires_grad, hooks[, state])`: the tensor."""
    match arguments:
        case [_Tensor() as tensor, _, _, *_]:
            return tensor
    raise _wrong_arguments(name)


def _make_with_attributes(name: str, arguments: tuple[Any, ...]) -> Any:
    """Of `_rebuild_from_type_v2(function, class, arguments, state)`: what the function makes."""
    match arguments:
        case (_Global(function), _Global(cls), tuple(inner), _) if function != name and cls in _CLASSES:
            return _call(_Global(function), inner)
    raise _wrong_arguments(name)


_FUNCTIONS: dict[str, Callable[[str, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _make_dictionary,
    "torch.Size": _make_size,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_tensor_v3": _make_tensor,
    "torch._utils._rebuild_parameter": _take_tensor,
    "torch._utils._rebuild_parameter_with_state": _take_tensor,
    "torch._tensor._rebuild_from_type_v2": _make_with_attributes,
}

_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Unpickler], None]] = {
    0x80: lambda self: _check_protocol(self._take_number(1)),
    ord("("): _Unpickler._mark,
    ord(")"): lambda self: self._stack.append(()),
    ord("]"): lambda self: self._push_new([]),
    ord("}"): lambda self: self._push_new(_Dictionary()),
    ord("t"): _Unpickler._push_marked_tuple,
    0x85: lambda self: self._push_tuple(1),
    0x86: lambda self: self._push_tuple(2),
    0x87: lambda self: self._push_tuple(3),
    ord("a"): lambda self: self._append([self._stack.pop()]),
    ord("e"): lambda self: self._append(self._pop_to_mark()),
    ord("s"): _Unpickler._set_item,
    ord("u"): lambda self: self._set_items(self._pop_to_mark()),
    ord("N"): lambda self: self._stack.append(None),
    0x88: lambda self: self._stack.append(True),
    0x89: lambda self: self._stack.append(False),
    ord("K"): lambda self: self._stack.append(self._take_number(1)),
    ord("M"): lambda self: self._stack.append(self._take_number(2)),
    ord("J"): lambda self: self._stack.append(int.from_bytes(self._take(4), "little", signed=True)),
    0x8A: lambda self: self._stack.append(int.from_bytes(self._take(self._take_number(1)), "little", signed=True)),
    ord("G"): lambda self: self._stack.append(struct.unpack(">d", self._take(8))[0]),
    ord("X"): lambda self: self._stack.append(self._take(self._take_number(4)).decode()),
    ord("U"): lambda self: self._stack.append(self._take(self._take_number(1)).decode()),  # of Python 2
    ord("q"): lambda self: self._memo.__setitem__(self._take_number(1), self._stack[-1]),
    ord("r"): lambda self: self._memo.__setitem__(self._take_number(4), self._stack[-1]),
    ord("h"): lambda self: self._stack.append(self._memo[self._take_number(1)]),
    ord("j"): lambda self: self._stack.append(self._memo[self._take_number(4)]),
    ord("c"): _Unpickler._push_global,
    ord("R"): _Unpickler._reduce,
    ord("b"): _Unpickler._build,
    ord("Q"): _Unpickler._push_storage,
}


def _check_protocol(protocol: int) -> None:
    if protocol != 2:
        raise _RefusedError(f"it is written in pickle protocol {protocol}, torch.save's own is 2")


def is_zip_pickle(path: Path) -> bool:
    """For `estimate`, which counts memory for files that must be loaded whole: none must any more."""
    return True


def load_legacy_pickle(path: Path) -> tuple[tuple[StoredTensor, ...], memoryview]:
    return read_pickle_header(path), memoryview(b"")
