"""A repository on the Hub as a source: which of its files are needed, its config, and its shards' headers by range.

Of weights that are there in several formats one is read: safetensors, or else `.bin`; never `.msgpack`, `.h5` or what
lies in folders. The bytes of the weights are not touched here: 66 billion parameters in 14 `.bin` files cost some
hundred small requests and 2 MB.

Without the network (HF_HUB_OFFLINE) a repository is what the Hub's cache has of it, and read like any directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from int8convert.checkpoint.hub.header_file import Evidence, HeaderFile, as_binary_file
from int8convert.checkpoint.hub.hub_file import HubFile, RangeReader
from int8convert.checkpoint.hub.known_ranges import KnownRanges
from int8convert.checkpoint.hub.repository import (
    Repository,
    RepositoryFile,
    fetch_small_files,
    find_cached,
    find_repository,
)
from int8convert.checkpoint.json_file import read_config as read_config_file
from int8convert.checkpoint.layout import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CARRIED_BYTES,
    PICKLE_INDEX_NAME,
    REQUEST_FILE,
    carried_paths,
    is_carried,
    quoted,
)
from int8convert.checkpoint.pickle_file import find_pickle_tensors
from int8convert.checkpoint.safetensors_file import find_safetensors_tensors
from int8convert.checkpoint.shard_index import AS_INDEXED, compare_index
from int8convert.checkpoint.source import (
    CARD_NAME,
    CheckpointSource,
    ShardReader,
    SourceShard,
    open_directory,
    read_weight_map,
    unfinished,
)
from int8convert.errors import CorruptFileError, SourceError

_HEADERS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard on the Hub. A `RemoteFile` of `int8convert.checkpoint.source`.

    Attributes:
        file: where it is.
        evidence: what its header was read from.
        known: parts that were fetched beforehand.
    """

    file: HubFile
    evidence: tuple[Evidence, ...]
    known: KnownRanges = field(default_factory=KnownRanges, repr=False, compare=False)

    @property
    def sha256(self) -> str | None:
        return self.file.sha256

    def open(self) -> ShardReader:
        return _PartReader(self.known, self.file.open())

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.known.fetch(self.file, ranges)

    def comes_again(self, ranges: Iterable[tuple[int, int]]) -> bool:
        return self.known.comes_again(self.file, ranges)


class _PartReader:
    """A `ShardReader` that has some of it in memory."""

    def __init__(self, known: KnownRanges, reader: RangeReader) -> None:
        self._known = known
        self._reader = reader

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ShardReader`."""
        if not self._known.read_into(buffer, offset):
            self._reader.read_into(buffer, offset)

    def close(self) -> None:
        """See `ShardReader`."""
        self._reader.close()


def open_repository(name: str, revision: str | None = None, cache_dir: Path | None = None) -> CheckpointSource:
    """Read a repository's config, index and shard headers; no weights.

    Args:
        name: ORGANIZATION/NAME.
        revision: a branch, a tag or a commit; None is the main branch.
        cache_dir: where the small files go; None is the Hub's cache.

    Raises:
        HubError: it cannot be had.
        SourceError: it holds no weights.
        CorruptFileError: its files contradict each other.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(name, revision, cache_dir)
    repository = find_repository(name, revision)
    if REQUEST_FILE in repository.files and CONFIG_NAME not in repository.files:
        raise unfinished(name)
    index_name, weight_names = _weights(repository)
    # The card is read, not carried: it tells the licence.
    going_along = sorted(filter(is_carried, repository.files))
    carried = [file_name for file_name in going_along if repository.files[file_name].n_bytes <= MAX_CARRIED_BYTES]
    extra = [file_name for file_name in (CONFIG_NAME, CARD_NAME, index_name) if file_name in repository.files]
    directory = fetch_small_files(repository, [*extra, *carried], cache_dir)
    weight_map = read_weight_map(directory / index_name, Path(weight_names[0]).suffix) if index_name else None
    if weight_map is not None:
        weight_names = _listed(repository, weight_map, index_name)
    files = [hub_file(repository, repository.files[file_name]) for file_name in weight_names]
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        shards = tuple(pool.map(lambda file: _read_shard(file, directory), files))
    differences = AS_INDEXED
    if weight_map is not None:
        shards, differences = compare_index(weight_map, shards)
    config = directory / CONFIG_NAME
    return CheckpointSource(
        label=name,
        directory=directory,
        config=read_config_file(config) if CONFIG_NAME in repository.files else {},
        shards=shards,
        carried=carried_paths(directory, carried),
        commit=repository.commit,
        left=tuple(file_name for file_name in going_along if file_name not in carried),
        index=differences,
    )


def _open_cached(name: str, revision: str | None, cache_dir: Path | None) -> CheckpointSource:
    found = find_cached(name, revision, cache_dir)
    return replace(open_directory(found, name), commit=found.name)


def _weights(repository: Repository) -> tuple[str, list[str]]:
    """The index and one weight file, of the format to read; or no index, and the only file."""
    for index_name, single_name in ((INDEX_NAME, "model.safetensors"), (PICKLE_INDEX_NAME, "pytorch_model.bin")):
        if index_name in repository.files:
            return index_name, [single_name]
        if single_name in repository.files:
            return "", [single_name]
    names = sorted(repository.files)
    raise SourceError(
        f"{quoted(repository.name)} holds no weights: expected model.safetensors, pytorch_model.bin or an index of "
        f"shards, found {', '.join(quoted(name, 40) for name in names[:5]) or 'nothing'}"
        f"{', ...' if len(names) > 5 else ''}",
        "name a repository with a transformers checkpoint; nothing was written",
    )


def _listed(repository: Repository, weight_map: dict[str, str], index_name: str) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        if name not in repository.files:
            raise CorruptFileError(
                f"'{index_name}' of {quoted(repository.name)} names shard {quoted(name)}, which is not there",
                "the repository is not complete; name another --revision of it; nothing was written",
            )
    return names


def hub_file(repository: Repository, file: RepositoryFile) -> HubFile:
    """A file of the repository, to be read."""
    return HubFile(repository.name, repository.commit, file.name, file.n_bytes, file.sha256, file.blob_id)


def _read_shard(file: HubFile, directory: Path) -> SourceShard:
    try:
        return _read_header(file, directory)
    except CorruptFileError:
        return _read_header(file, directory)  # it may have come with wrong bytes


def _read_header(file: HubFile, directory: Path) -> SourceShard:
    header = HeaderFile(file)
    opened = as_binary_file(header)
    if file.name.endswith(".safetensors"):
        tensors = find_safetensors_tensors(opened, file.n_bytes, file.name)
    else:
        tensors = find_pickle_tensors(opened, file.n_bytes, file.name, is_remote=True)
    return SourceShard(directory / file.name, file.n_bytes, tensors, RemoteShard(file, header.evidence()))
