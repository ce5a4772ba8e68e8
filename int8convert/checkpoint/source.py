"""Where a checkpoint comes from: its config, its shards and the files that go along.

A source lists its shards with the tensors in them, from headers alone, and opens one shard at a time for reading. It is
a directory, or a repository on the Hub, see `int8convert.checkpoint.hub`: of that, the small files lie in the Hub's
cache, and the shards stay where they are until somebody reads them.

A checkpoint is a stranger's: whatever is in the directory, opening it ends in a source that can be read or in a
SourceError, within memory in proportion to its headers. A weight file that is replaced or changed after its header was
read is an error when it is opened again, see `file_reader`; a small file that is changed meanwhile is not noticed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.file_reader import FileIdentity, FileReader
from int8convert.checkpoint.json_file import MAX_INDEX_BYTES, read_json_object
from int8convert.checkpoint.layout import (
    ADAPTER_CONFIG,
    CONFIG_NAME,
    MAX_CARRIED_BYTES,
    REQUEST_FILE,
    carried_paths,
    find_file,
    open_regular,
    quoted,
)
from int8convert.checkpoint.listing import DirectoryListing
from int8convert.checkpoint.loader_files import LoaderFiles, find_loader_files
from int8convert.checkpoint.loader_notes import note_aside, note_large
from int8convert.checkpoint.pickle_file import find_pickle_tensors
from int8convert.checkpoint.safetensors_file import find_safetensors_tensors
from int8convert.checkpoint.shard_index import AS_INDEXED, IndexDifferences, compare_index
from int8convert.checkpoint.source_name import is_repository_name, naming_hint
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import CorruptFileError, HubMissingError, SourceError

CARD_NAME = "README.md"


class ShardReader(Protocol):
    """One open shard. `read_into` may be called by several threads at once."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the shard's bytes from `offset` on.

        Raises:
            CorruptFileError: the file has become shorter since its header was read.
            HubError: it is on the Hub and does not come from there.
        """

    def close(self) -> None:
        """Harmless if done before."""


class RemoteFile(Protocol):
    """A file on the Hub, at one commit.

    sha256: of its content, in hex; None if the Hub does not know it, as of small files outside of LFS.
    """

    @property
    def sha256(self) -> str | None: ...

    def open(self) -> ShardReader: ...

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Get parts of it, first byte and one behind the last, for whoever will open it and read just these.

        They are compared when the whole file comes, see `int8convert.checkpoint.shard_access`.
        """

    def comes_again(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Whether such parts are the same when they are fetched once more; if not, all of them are forgotten."""


@dataclass(frozen=True, slots=True)
class SourceShard:
    """One weight file and the tensors in it, in the order of their bytes.

    Attributes:
        path: the file; of one on the Hub, where it would lie beside the config.
        remote: where its bytes are, if not in `path`.
        identity: what the file was when its header was read; None of a file on the Hub.
    """

    path: Path
    n_bytes: int
    tensors: tuple[StoredTensor, ...] = field(repr=False)
    remote: RemoteFile | None = field(default=None, repr=False)
    identity: FileIdentity | None = field(default=None, repr=False)

    def open(self) -> ShardReader:
        """Open the file for reading here and there. For reading all of a shard on the Hub there is `shard_access`.

        Raises:
            CorruptFileError: it is a local file, and not the one whose header was read.
        """
        return self.remote.open() if self.remote is not None else FileReader(self.path, self.identity)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint to read.

    Attributes:
        label: the source as the user named it.
        directory: where its small files are.
        config: the config that transformers reads, see `loader_files`; {} where there is none.
        shards: its weight files.
        carried: small files that go along unchanged.
        commit: of the repository on the Hub that `label` names; None of a directory.
        notes: messages on files that are not converted.
        has_adapter: an adapter lies beside the weights, which is not part of them here.
        index: where the index and the weight files differ; the shards hold what loaders take.
        config_name: the file `config` was read from.
        index_dtype: what the index says of the weights' dtype, as a stranger wrote it.
    """

    label: str
    directory: Path
    config: dict[str, Any] = field(repr=False)
    shards: tuple[SourceShard, ...] = field(repr=False)
    carried: tuple[Path, ...] = field(repr=False)
    commit: str | None = None
    notes: tuple[str, ...] = ()
    has_adapter: bool = False
    index: IndexDifferences = field(default=AS_INDEXED, repr=False)
    config_name: str = CONFIG_NAME
    index_dtype: str | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.n_bytes for shard in self.shards)


def open_source(
    src: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: Path | None = None,
    ignores_adapter: bool = False,
) -> CheckpointSource:
    """Read a checkpoint's config, index and shard headers; no weights. Which files these are, `loader_files` tells.

    Args:
        src: a directory; or, if there is none of that name, the name of a repository on the Hub, ORGANIZATION/NAME.
        revision: of the repository: a branch, a tag or a commit.
        cache_dir: where the small files of a repository go; None is the Hub's cache.
        ignores_adapter: read the weights alone, also where an adapter lies beside them.

    Raises:
        SourceError: there is no such directory, no weights are in it, files are none or lie elsewhere, or loaders would
            take what is not converted here.
        CorruptFileError: a file contradicts what it, or the index, promises.
        HubError: the repository cannot be had.
    """
    if not is_repository_name(src):
        return open_directory(Path(src), str(src), ignores_adapter)
    from int8convert.checkpoint.hub.source import open_repository

    try:
        return open_repository(str(src), revision, cache_dir, ignores_adapter)
    except HubMissingError as error:
        if revision is None:  # else a repository is meant
            error.hint += f"; no directory {quoted(str(src), 200)} is here either"
        raise


def open_directory(directory: Path, label: str, ignores_adapter: bool = False) -> CheckpointSource:
    """As `open_source`, of a directory.

    Args:
        label: what the user calls it.
    """
    try:
        return _open_directory(directory, label, ignores_adapter)
    except OSError as error:
        where = f"{quoted(os.path.basename(error.filename))} in " if isinstance(error.filename, str) else ""
        raise SourceError(
            f"{where}{quoted(label, 300)} cannot be read: {error.strerror}",
            "check that you may read the directory and that its disk works; nothing was written",
        ) from error


def _open_directory(directory: Path, label: str, ignores_adapter: bool) -> CheckpointSource:
    if not directory.is_dir():
        found = "a file" if directory.exists() else "nothing there"
        raise SourceError(f"{quoted(label, 300)} is not a checkpoint directory: {found}", naming_hint(label))
    listing = DirectoryListing(directory, label)
    if CONFIG_NAME not in listing.root and find_file(directory, REQUEST_FILE) is not None:
        raise unfinished(label)
    files = find_loader_files(listing, ignores_adapter)
    find_file(directory, CARD_NAME)  # so that a card that cannot be read is refused now, not when all is converted
    carried = carried_paths(directory, files.carried)
    left = {path for path in carried if path.stat().st_size > MAX_CARRIED_BYTES}
    shards, differences = _read_shards(directory, files)
    taken = (files.weights, *(shard.path.name for shard in shards))
    return CheckpointSource(
        label=label,
        directory=directory,
        config=files.config,
        shards=shards,
        carried=tuple(path for path in carried if path not in left),
        notes=(*files.notes, *note_aside(listing.root, taken), *note_large(sorted(path.name for path in left))),
        has_adapter=ADAPTER_CONFIG in listing.root,
        index=differences,
        config_name=files.config_name or CONFIG_NAME,
        index_dtype=read_index_dtype(found_file(directory, files.weights)) if files.is_indexed else None,
    )


def unfinished(label: str) -> SourceError:
    """The error for a conversion of ours that did not come to its end: config.json is written last."""
    return SourceError(
        f"{quoted(label, 300)} is an unfinished conversion",
        "the quantize command that began it finishes it; nothing was written",
    )


def _read_shards(directory: Path, files: LoaderFiles) -> tuple[tuple[SourceShard, ...], IndexDifferences]:
    """Read the headers of the weight files."""
    path = found_file(directory, files.weights)
    weight_map = read_weight_map(path, files.suffix) if files.is_indexed else None
    names = [files.weights] if weight_map is None else _shard_names(directory, weight_map, files.weights)
    shards = tuple(read_shard(found_file(directory, name)) for name in names)
    return compare_index(weight_map or {}, shards)


def found_file(directory: Path, name: str) -> Path:
    """Return the path of a file that was listed; raises as `find_file`, and if it has gone since."""
    path = find_file(directory, name)
    if path is None:
        raise CorruptFileError(
            f"{quoted(name)} is not there any more",
            "leave the checkpoint alone while it is read, and rerun the same command; nothing was written",
        )
    return path


def read_shard(path: Path) -> SourceShard:
    """One weight file, from its header.

    Raises:
        CorruptFileError: it is none, or contradicts itself.
    """
    with open(open_regular(path), "rb") as file:
        identity = FileIdentity.of(file.fileno())
        find_tensors = find_safetensors_tensors if path.suffix == ".safetensors" else find_pickle_tensors
        tensors = find_tensors(file, identity.n_bytes, path.name)
        return SourceShard(path, identity.n_bytes, tensors, identity=identity)


def read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name of an index: plain names of files in `suffix`, which lie beside it.

    Raises:
        CorruptFileError: it has none, or it points elsewhere.
    """
    weight_map = read_json_object(index, MAX_INDEX_BYTES, allow_nan=False).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file_name, str) for file_name in weight_map.values())
    ):
        raise CorruptFileError(
            f"'{index.name}' has no weight_map from tensor names to file names",
            "fetch the index again; nothing was written",
        )
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(suffix) or not file_name.isprintable():
            raise CorruptFileError(
                f"'{index.name}' points to {quoted(file_name)}, which is not a plain file name ending in {suffix}",
                "shards lie beside their index; nothing outside the checkpoint was read",
            )
    return weight_map


def read_index_dtype(index: Path) -> str | None:
    """The dtype in an index's metadata, which transformers loads in where config.json states none; None without."""
    metadata = read_json_object(index, MAX_INDEX_BYTES, allow_nan=False).get("metadata")
    dtype = metadata.get("dtype") if isinstance(metadata, dict) else None
    return dtype if isinstance(dtype, str) else None


def _shard_names(directory: Path, weight_map: dict[str, str], index_name: str) -> list[str]:
    """Return the names of the shards of an index, each a file of its own beside it."""
    names = sorted(set(weight_map.values()))
    seen: dict[tuple[int, int], str] = {}
    for file_name in names:
        path = find_file(directory, file_name)
        if path is None:
            raise CorruptFileError(
                f"'{index_name}' names shard {quoted(file_name)}, which is not there",
                "fetch the missing shard and rerun the same command; nothing was written",
            )
        # Links cost nothing: a thousand of them to one large header would cost the memory of a thousand.
        status = path.stat()
        other = seen.setdefault((status.st_dev, status.st_ino), file_name)
        if other != file_name:
            raise CorruptFileError(
                f"'{index_name}' names shards {quoted(other)} and {quoted(file_name)}, which are one file",
                "fetch the checkpoint again; nothing was written",
            )
    return names
