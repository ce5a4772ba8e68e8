"""A `pytorch_model*.bin` shard: where its tensors' bytes are, without running anything it contains.

1. The zip directory is read and every record checked to be stored uncompressed and inside the file.
2. torch's weights-only unpickler builds the tensors on the meta device: shapes, strides and storages, no data.
3. Each storage carries the offset of its bytes in the file, so the data is then read in blocks like any other shard's.

Files from before torch 1.6 are no zip archives; torch can only load those whole, so that is what happens to them and
what the plan's peak memory counts. Anything but a flat dictionary of dense tensors is refused.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor, contiguous_strides
from int8convert.errors import CorruptFileError

if TYPE_CHECKING:
    import torch

_LOCAL_HEADER_BYTES = 30
"""Fixed part of a zip record's local header; the lengths of name and extra field are its last two 16-bit numbers."""


def is_zip_pickle(path: Path) -> bool:
    """Whether a `.bin` file is of the format torch writes since 1.6, which can be read in blocks."""
    return zipfile.is_zipfile(path)


def read_pickle_header(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a `.bin` shard, in the order of their bytes, from its directory and pickle alone.

    Raises:
        CorruptFileError: not a pickle of plain tensors, or one that asks to run code.
    """
    record_bytes = _stored_records(path)
    tensors = []
    for name, tensor in _load_state_dict(path, location="meta").items():
        storage = tensor.untyped_storage()
        # Private, but what torch's own mmap loading is built on; a release without it is caught right here.
        begin = storage._checkpoint_offset
        assert begin is not None, "torch no longer states storage offsets"
        stored = _describe(name, tensor, begin, path.name)
        if stored.offset + stored.span_bytes > begin + record_bytes.get(begin, -1):
            raise _corrupt(path.name, f"{name!r} reaches beyond its storage")
        tensors.append(stored)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)))


def load_legacy_pickle(path: Path) -> tuple[tuple[StoredTensor, ...], memoryview]:
    """The tensors of a pre-1.6 `.bin` shard and one buffer with all their bytes, at the offsets they state.

    Needs about twice the file's size in memory while it runs: this format cannot be read in parts.
    """
    import torch

    storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
    at = 0
    tensors = []
    for name, tensor in _load_state_dict(path, location="cpu").items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = (at, storage)
            at += storage.nbytes() + -storage.nbytes() % 64
        tensors.append(_describe(name, tensor, storages[storage.data_ptr()][0], path.name))
    buffer = torch.zeros(at, dtype=torch.uint8)
    for begin, storage in storages.values():
        buffer[begin : begin + storage.nbytes()] = torch.tensor([], dtype=torch.uint8).set_(storage)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name))), memoryview(buffer.numpy().data)


def _corrupt(file_name: str, what: str) -> CorruptFileError:
    return CorruptFileError(
        f"'{file_name}' cannot be read as a weights-only pickle: {what}",
        "nothing of it was run or written; fetch the file again, or use a safetensors version of the checkpoint",
    )


def _stored_records(path: Path) -> dict[int, int]:
    """Offset -> size of each record's data in a zip archive; every record is uncompressed and inside the file."""
    file_bytes = path.stat().st_size
    records: dict[int, int] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                file.seek(info.header_offset)
                local = file.read(_LOCAL_HEADER_BYTES)
                lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                begin = info.header_offset + _LOCAL_HEADER_BYTES + lengths
                if info.compress_type != zipfile.ZIP_STORED or begin + info.file_size > file_bytes:
                    raise _corrupt(path.name, f"the record {info.filename!r} is compressed or truncated")
                records[begin] = info.file_size
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise _corrupt(path.name, str(error)) from None
    return records


def _load_state_dict(path: Path, location: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on unusual pickles; what matters of it is raised
            state_dict: Any = torch.load(path, map_location=location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        # torch's message advises how to run the code after all, in many lines: we quote the first sentence only.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _corrupt(path.name, reason[:160]) from None
    if not isinstance(state_dict, dict):
        raise _corrupt(path.name, f"it holds a {type(state_dict).__name__}, not a dictionary of tensors")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _corrupt(path.name, f"the entry {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise _corrupt(path.name, f"{name!r} is no dense tensor")
    return state_dict


def _describe(name: str, tensor: torch.Tensor, storage_begin: int, file_name: str) -> StoredTensor:
    import torch

    names = {
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.uint16: "U16",
        torch.int16: "I16",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.uint32: "U32",
        torch.int32: "I32",
        torch.float32: "F32",
        torch.uint64: "U64",
        torch.int64: "I64",
        torch.float64: "F64",
        torch.complex64: "C64",
    }
    if tensor.dtype not in names:
        raise _corrupt(file_name, f"{name!r} has dtype {tensor.dtype}, which a safetensors file cannot hold")
    dtype = names[tensor.dtype]
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return StoredTensor(
        name=name,
        dtype=dtype,
        shape=shape,
        offset=storage_begin + int(tensor.storage_offset()) * DTYPE_BYTES[dtype],
        strides=None if tensor.is_contiguous() or strides == contiguous_strides(shape) else strides,
        storage=storage_begin,
    )
