"""Descriptions of the values in a pickle of `torch.save`: tensors, storages, dictionaries, and results of calls.

Nothing is called, looked up or imported here. A function of torch is a name, and its arguments describe its result.

Source: torch/_utils.py and torch/serialization.py for names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from int8convert.checkpoint.stored_tensor import is_shape, is_size

MAX_PICKLE_BYTES = 32_000_000
"""Most bytes of a pickle. A tensor takes about 130, so there is room for 200,000."""

_MAX_ARGUMENTS = 16
"""Most arguments of a call. torch's functions take up to 8. Repeated calls with millions would copy them each time."""

STORAGES = {
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
DTYPES = {
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
}
"""Dtypes that `torch.save` names beside an untyped storage."""

UNSTORABLE = {
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
NOT_DENSE = frozenset(
    f"torch._utils._rebuild_{kind}"
    for kind in ("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage", "wrapper_subclass")
)

CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})


class RefusedError(Exception):
    """The reason for which a file is refused. Callers add the file's name, in a CorruptFileError."""


@dataclass(frozen=True, slots=True)
class Global:
    """A module and attribute that the pickle names. It is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in the file, found by its key."""

    key: str
    dtype: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Dictionary:
    """A dictionary as the list of its entries. A stranger's keys are not hashed, because that could take for ever."""

    __slots__ = ("entries",)

    def __init__(self, entries: list[Any] | None = None) -> None:
        self.entries: list[Any] = [] if entries is None else entries


def kind_of(value: Any) -> str:
    names = {Dictionary: "dict", Storage: "storage", Tensor: "tensor", Global: "reference", str: "string"}
    return f"a {names.get(type(value), type(value).__name__)}"


def call(function: Any, arguments: Any) -> Any:
    """Return a description of the result of a function of torch."""
    if not isinstance(function, Global) or function.name not in FUNCTIONS or type(arguments) is not tuple:
        raise RefusedError(f"its pickle calls {kind_of(function)} that is no function")
    if len(arguments) > _MAX_ARGUMENTS:
        raise _wrong_arguments(function.name)
    return FUNCTIONS[function.name](function.name, arguments)


def _wrong_arguments(name: str) -> RefusedError:
    return RefusedError(f"it calls {name} with arguments that describe no tensor")


def _make_dictionary(name: str, arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case ():
            return Dictionary()
        case (list(entries),):  # as Python 2 wrote them; the list is shared, copies of copies could fill the memory
            return Dictionary(entries)
    raise _wrong_arguments(name)


def _make_size(name: str, arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (tuple(sizes),):
            return sizes
    raise _wrong_arguments(name)


def _make_tensor(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the tensor of `_rebuild_tensor(storage, offset, size, stride, ...)`, in any version of torch/_utils.py."""
    match arguments:
        case [Storage() as storage, offset, tuple(shape), tuple(strides), *rest]:
            dtype = storage.dtype
        case _:
            raise _wrong_arguments(name)
    match name.removeprefix("torch._utils._rebuild_tensor"), rest:
        case "_v3", [_, _, Global(dtype_name), *metadata] if dtype_name in DTYPES:
            dtype = DTYPES[dtype_name]
        case ("_v2", [_, _, *metadata]) | ("", [*metadata]):
            pass
        case _:
            raise _wrong_arguments(name)
    if metadata not in ([], [None]) and not (isinstance(metadata[0], Dictionary) and not metadata[0].entries):
        raise RefusedError("it holds a tensor marked as conjugate or negative, so its bytes are not its values")
    if (
        not is_shape(shape, dtype)
        or not is_size(offset)
        or len(strides) != len(shape)
        or not all(map(is_size, strides))
    ):
        raise _wrong_arguments(name)
    return Tensor(storage, dtype, offset, shape, strides)


def _take_tensor(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the tensor of `_rebuild_parameter(tensor, requires_grad, hooks[, state])`."""
    match arguments:
        case [Tensor() as tensor, _, _, *_]:
            return tensor
    raise _wrong_arguments(name)


def _make_with_attributes(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return the result of `_rebuild_from_type_v2(function, class, arguments, state)`."""
    match arguments:
        case (Global(function), Global(cls), tuple(inner), _) if function != name and cls in CLASSES:
            return call(Global(function), inner)
    raise _wrong_arguments(name)


FUNCTIONS: dict[str, Callable[[str, tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _make_dictionary,
    "torch.Size": _make_size,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_tensor_v3": _make_tensor,
    "torch._utils._rebuild_parameter": _take_tensor,
    "torch._utils._rebuild_parameter_with_state": _take_tensor,
    "torch._tensor._rebuild_from_type_v2": _make_with_attributes,
}
