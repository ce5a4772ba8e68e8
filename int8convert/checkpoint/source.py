"""Where a checkpoint comes from: its config, its shards and the files that go along.

A source lists its shards with the tensors in them, from headers alone, and opens one shard at a time for reading. Today
it is a directory; what the rest of int8convert sees of it is written so that a Hub repository fits the same shape.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.layout import CONFIG_NAME, INDEX_NAME, PICKLE_INDEX_NAME, carried_files, read_json_object
from int8convert.checkpoint.pickle_file import is_zip_pickle, load_legacy_pickle, read_pickle_header
from int8convert.checkpoint.safetensors_file import read_exactly, read_safetensors_header
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import CorruptFileError, SourceError


class ShardReader:
    """One open shard. `read_into` may be called by several threads at once.

    By `pread`, not by a memory map: a file that shrinks under a map kills the process without a word, and copying from
    the page cache into a buffer that stays in the core's cache costs less than the page faults do.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._memory: memoryview | None = None
        self._fd = -1
        if path.suffix == ".bin" and not is_zip_pickle(path):
            self._memory = load_legacy_pickle(path)[1]
        else:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the shard's bytes from `offset` on.

        Raises:
            CorruptFileError: the file has become shorter since its header was read.
        """
        if self._memory is not None:
            buffer[:] = self._memory[offset : offset + len(buffer)]
        else:
            read_exactly(self._fd, buffer, offset, self._name)

    @property
    def offsets_are_the_files(self) -> bool:
        """Whether what is read lies in the file at the offset it is read from; not so in a shard loaded whole."""
        return self._memory is None

    def close(self) -> None:
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One weight file and the tensors in it, in the order of their bytes."""

    path: Path
    n_bytes: int
    tensors: tuple[StoredTensor, ...] = field(repr=False)

    def open(self) -> ShardReader:
        return ShardReader(self.path)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint to read.

    Attributes:
        label: the source as the user named it.
        config: the parsed config.json; {} where there is none.
        shards: its weight files.
        carried: small files that go along unchanged.
    """

    label: str
    directory: Path
    config: dict[str, Any] = field(repr=False)
    shards: tuple[SourceShard, ...] = field(repr=False)
    carried: tuple[Path, ...] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.n_bytes for shard in self.shards)


def open_source(src: str | os.PathLike[str]) -> CheckpointSource:
    """Read a local checkpoint directory's config, index and shard headers; no weights.

    safetensors is preferred over `.bin` where both are present.

    Raises:
        SourceError: no such directory, or no weights in it.
        CorruptFileError: a file contradicts what it, or the index, promises.
    """
    directory = Path(src)
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise SourceError(
            f"'{src}' is not a checkpoint directory: {found}",
            "give a directory with config.json and model*.safetensors or pytorch_model*.bin; nothing was written",
        )
    config_path = directory / CONFIG_NAME
    return CheckpointSource(
        label=str(src),
        directory=directory,
        config=read_json_object(config_path) if config_path.is_file() else {},
        shards=_read_shards(directory),
        carried=carried_files(directory),
    )


def _read_shards(directory: Path) -> tuple[SourceShard, ...]:
    for index_name, single_name in ((INDEX_NAME, "model.safetensors"), (PICKLE_INDEX_NAME, "pytorch_model.bin")):
        if (directory / index_name).is_file():
            return _read_indexed_shards(directory, index_name)
        if (directory / single_name).is_file():
            return (_read_shard(directory / single_name),)
    names = sorted(entry.name for entry in directory.iterdir())
    raise SourceError(
        f"'{directory}' holds no weights: expected model.safetensors, pytorch_model.bin or an index of shards, "
        f"found {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}",
        "give the directory that holds the weight files; nothing was written",
    )


def _read_shard(path: Path) -> SourceShard:
    if path.suffix == ".safetensors":
        tensors = read_safetensors_header(path)
    elif is_zip_pickle(path):
        tensors = read_pickle_header(path)
    else:
        tensors = load_legacy_pickle(path)[0]
    return SourceShard(path, path.stat().st_size, tensors)


def _read_indexed_shards(directory: Path, index_name: str) -> tuple[SourceShard, ...]:
    weight_map = read_json_object(directory / index_name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file_name, str) for file_name in weight_map.values())
    ):
        raise CorruptFileError(
            f"'{index_name}' has no weight_map from tensor names to file names",
            "fetch the index again; nothing was written",
        )
    shards = []
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise CorruptFileError(
                f"'{index_name}' points to {file_name!r}, which is not a plain file name",
                "shards lie beside their index; nothing outside the checkpoint was read",
            )
        path = directory / file_name
        if not path.is_file():
            raise CorruptFileError(
                f"'{index_name}' names shard '{file_name}', which is not there",
                "fetch the missing shard and rerun the same command; nothing was written",
            )
        shards.append(_read_shard(path))
    _check_index(weight_map, shards, index_name)
    return tuple(shards)


def _check_index(weight_map: dict[str, str], shards: list[SourceShard], index_name: str) -> None:
    """Every tensor of the index is in its shard, and no tensor in two."""
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise CorruptFileError(
                    f"tensor {tensor.name!r} is in two shards: '{found[tensor.name]}' and '{shard.path.name}'",
                    "the files belong to different versions; fetch the checkpoint again; nothing was written",
                )
            found[tensor.name] = shard.path.name
    for name, file_name in weight_map.items():
        if found.get(name) != file_name:
            raise CorruptFileError(
                f"'{index_name}' promises {name!r} in '{file_name}', found {found.get(name, 'nowhere')!r}",
                "index and shards belong to different versions; fetch the checkpoint again; nothing was written",
            )
