"""Runs the operations of a pickle on descriptions of values. It calls and imports nothing.

torch's weights-only loader runs it with few functions to call; that keeps the program from doing what it likes, but not
from taking memory and time: it may ask for a bytearray of a terabyte, or for the hash of a tuple that holds itself
forty levels deep.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from int8convert.checkpoint.pickle.values import (
    CLASSES,
    DTYPES,
    FUNCTIONS,
    NOT_DENSE,
    STORAGES,
    UNSTORABLE,
    Dictionary,
    Global,
    RefusedError,
    Storage,
    Tensor,
    call,
    kind_of,
)
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, is_size
from int8convert.text import quoted

MAX_OBJECTS = 2_000_000
"""Containers, entries, calls and marks of a pickle. A tensor takes 10; each costs up to 400 bytes of memory, for as few
as one of the file."""


class Unpickler:
    """Reads consecutive pickles and returns what they describe; calls and imports nothing.

    Knows the operations that `torch.save` writes in its own protocol, 2. Source: the pickletools module of Python.

    Attributes:
        at: where the next pickle begins.
        storages: key -> the first storage of that key that a pickle referred to.
    """

    def __init__(self, data: bytes, begin: int = 0) -> None:
        self._data = data
        self._n_objects = 0
        self.at = begin
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while True:
                code = self._take(1)[0]
                if code == _STOP:
                    if len(self._stack) != 1 or self._outer:
                        raise RefusedError("its pickle ends with more or less than one value")
                    return self._stack.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise RefusedError(f"it uses the pickle operation {bytes([code])!r}, which torch does not write")
                operation(self)
        except (IndexError, KeyError):  # of the stack and of the memo
            raise RefusedError("its pickle uses a value that it has not stored before") from None
        except UnicodeDecodeError:
            raise RefusedError("its pickle holds text that is not UTF-8") from None

    def _take(self, n_bytes: int) -> bytes:
        taken = self._data[self.at : self.at + n_bytes]
        if len(taken) != n_bytes:
            raise RefusedError("its pickle is truncated, or larger than any of a model's")
        self.at += n_bytes
        return taken

    def _take_number(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _take_line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 200)
        if end < 0:
            raise RefusedError("its pickle is truncated, or names something absurdly long")
        line = self._data[self.at : end]
        self.at = end + 1
        return line.decode()

    def _count_objects(self, n: int) -> None:
        self._n_objects += n
        if self._n_objects > MAX_OBJECTS:
            raise RefusedError(f"its pickle makes more than {MAX_OBJECTS:,} objects")

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
            raise RefusedError(f"its pickle appends to {kind_of(target)}")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Dictionary) or len(items) % 2:
            raise RefusedError(f"its pickle sets entries of {kind_of(target)}")
        self._count_objects(len(items) // 2)
        target.entries.extend(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _push_global(self) -> None:
        name = f"{self._take_line()}.{self._take_line()}"
        if name in UNSTORABLE:
            raise RefusedError(f"it holds a tensor of dtype {UNSTORABLE[name]}, which a safetensors file cannot hold")
        if name in NOT_DENSE:
            raise RefusedError(f"it calls {name}, so it does not hold a dense tensor")
        if name not in FUNCTIONS and name not in STORAGES and name not in DTYPES and name not in CLASSES:
            raise RefusedError(f"it asks for {quoted(name)}, which is no part of a plain tensor")
        self._stack.append(Global(name))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._push_new(call(self._stack.pop(), arguments))

    def _build(self) -> None:
        """Attributes set on an object, such as the `_metadata` of a state dict: of no use here."""
        self._stack.pop()
        if not isinstance(self._stack[-1], Dictionary | Tensor):
            raise RefusedError(f"its pickle sets the state of {kind_of(self._stack[-1])}")

    def _push_storage(self) -> None:
        match self._stack.pop():
            case ["storage", Global(kind), str(key), str(), n, *rest] if (
                kind in STORAGES and is_size(n) and rest in ([], [None])  # before torch 0.4, a part of another one
            ):
                dtype = STORAGES[kind]
                storage = Storage(key, dtype, n * DTYPE_BYTES[dtype])
                if self.storages.setdefault(key, storage) != storage:
                    raise RefusedError(f"it refers to the storage {quoted(key, 40)} in two ways")
                self._push_new(storage)
            case _:
                raise RefusedError("it refers to something that is no storage of numbers")


def _check_protocol(protocol: int) -> None:
    if protocol != 2:
        raise RefusedError(f"it is written in pickle protocol {protocol}, torch.save's own is 2")


_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[Unpickler], None]] = {
    0x80: lambda self: _check_protocol(self._take_number(1)),
    ord("("): Unpickler._mark,
    ord(")"): lambda self: self._stack.append(()),
    ord("]"): lambda self: self._push_new([]),
    ord("}"): lambda self: self._push_new(Dictionary()),
    ord("t"): Unpickler._push_marked_tuple,
    0x85: lambda self: self._push_tuple(1),
    0x86: lambda self: self._push_tuple(2),
    0x87: lambda self: self._push_tuple(3),
    ord("a"): lambda self: self._append([self._stack.pop()]),
    ord("e"): lambda self: self._append(self._pop_to_mark()),
    ord("s"): Unpickler._set_item,
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
    ord("c"): Unpickler._push_global,
    ord("R"): Unpickler._reduce,
    ord("b"): Unpickler._build,
    ord("Q"): Unpickler._push_storage,
}
