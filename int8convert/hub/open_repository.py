"""Opens a repository on the Hub as a source: its config, and its shards' headers by range requests.

`int8convert.checkpoint.loaders` chooses the files, as for a directory. Weights are not read: the headers of 66 billion
parameters in 14 `.bin` files cost some hundred small requests and 2 MB.

Without the network (HF_HUB_OFFLINE) the Hub's cache is read like a directory.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from int8convert.checkpoint.directory import found_file, open_directory, read_index_dtype, read_weight_map, unfinished
from int8convert.checkpoint.json_file import check_config_bytes, read_config_value
from int8convert.checkpoint.loaders.files import find_loader_files
from int8convert.checkpoint.loaders.notes import note_aside, note_large
from int8convert.checkpoint.loaders.shard_index import compare_index
from int8convert.checkpoint.model_card import find_card
from int8convert.checkpoint.names import (
    ADAPTER_CONFIG,
    CARD_NAME,
    CONFIG_NAME,
    MAX_AUXILIARY_BYTES,
    REQUEST_FILE,
    auxiliary_paths,
)
from int8convert.checkpoint.pickle.reader import find_pickle_tensors
from int8convert.checkpoint.safetensors_file import find_safetensors_tensors
from int8convert.checkpoint.source import CheckpointSource, ShardReader, SourceShard
from int8convert.errors import CorruptFileError
from int8convert.hub.errors import TransientError
from int8convert.hub.header_file import HeaderFile, RangeDigest
from int8convert.hub.prefetched_ranges import PrefetchedRanges
from int8convert.hub.remote_file import HubFile, RangeReader
from int8convert.hub.repository import Repository, find_repository
from int8convert.hub.retry import RetryBudget, retrying
from int8convert.hub.small_files import fetch_small_files, find_cached
from int8convert.text import quoted

_N_CONNECTIONS = 8
_MAX_HEADER_READS = 2
"""Reads of a header that contradicts itself: it may have arrived with wrong bytes."""


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """A shard on the Hub. A `RemoteFile` of `int8convert.checkpoint.source`."""

    file: HubFile
    header_digests: tuple[RangeDigest, ...]
    prefetched: PrefetchedRanges = field(default_factory=PrefetchedRanges, repr=False, compare=False)

    @property
    def sha256(self) -> str | None:
        return self.file.sha256

    def open(self) -> ShardReader:
        return _PrefetchingReader(self.prefetched, self.file.open())

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.prefetched.fetch(self.file, ranges)

    def refetch_matches(self, ranges: Iterable[tuple[int, int]]) -> bool:
        return self.prefetched.refetch_matches(self.file, ranges)


class _PrefetchingReader:
    """A `ShardReader` that serves prefetched ranges from memory, and fetches all others."""

    def __init__(self, prefetched: PrefetchedRanges, reader: RangeReader) -> None:
        self._prefetched = prefetched
        self._reader = reader

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if not self._prefetched.read_into(buffer, offset):
            self._reader.read_into(buffer, offset)

    def close(self) -> None:
        self._reader.close()


def open_repository(
    name: str, revision: str | None = None, cache_dir: Path | None = None, ignores_adapter: bool = False
) -> CheckpointSource:
    """Read a repository's config, index and shard headers, but no weights.

    Args:
        revision: a branch, a tag or a commit; None is the main branch.
        cache_dir: the cache for the small files; None is the Hub's cache.

    Raises:
        HubError: the repository cannot be read.
        SourceError: it holds no weights.
        CorruptFileError: its files contradict each other.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        found = find_cached(name, revision, cache_dir)
        return replace(open_directory(found, name, ignores_adapter), commit=found.name)
    repository = find_repository(name, revision)
    if REQUEST_FILE in repository.files and CONFIG_NAME not in repository.files:
        raise unfinished(name)
    listing = RepositoryListing(repository, name, cache_dir)
    taken = find_loader_files(listing, ignores_adapter)
    sizes = {file_name: repository.files[file_name].n_bytes for file_name in taken.auxiliary_files}
    auxiliary = [file_name for file_name, n_bytes in sizes.items() if n_bytes <= MAX_AUXILIARY_BYTES]
    # The card is read for its licence, and not copied.
    read = {CONFIG_NAME, CARD_NAME, taken.config_name or CONFIG_NAME, *([taken.weights] if taken.is_indexed else [])}
    small = sorted(file_name for file_name in read if file_name in repository.files)
    directory = fetch_small_files(repository, [*small, *auxiliary], cache_dir)
    find_card(directory)  # refuses a bad card now, as for a directory, not after the conversion
    weight_map = read_weight_map(found_file(directory, taken.weights), taken.suffix) if taken.is_indexed else {}
    names = _listed(repository, weight_map, taken.weights) if weight_map else [taken.weights]
    files = [repository.files[file_name] for file_name in names]
    with ThreadPoolExecutor(_N_CONNECTIONS) as pool:
        shards, differences = compare_index(
            weight_map, tuple(pool.map(lambda file: _read_shard(file, directory), files))
        )
    aside = note_aside(listing.root, (taken.weights, *(file.name for file in files)))
    return CheckpointSource(
        label=name,
        directory=directory,
        config=taken.config,
        shards=shards,
        auxiliary_files=auxiliary_paths(directory, auxiliary),
        commit=repository.commit,
        notes=(*taken.notes, *aside, *note_large(file_name for file_name in sizes if file_name not in auxiliary)),
        has_adapter=ADAPTER_CONFIG in listing.root,
        index=differences,
        config_name=taken.config_name or CONFIG_NAME,
        index_dtype=read_index_dtype(found_file(directory, taken.weights)) if taken.is_indexed else None,
    )


class RepositoryListing:
    """A `Listing` of a repository on the Hub. `read` fetches a file into the Hub's cache."""

    is_remote = True

    def __init__(self, repository: Repository, label: str, cache_dir: Path | None = None) -> None:
        self._repository = repository
        self._cache_dir = cache_dir
        self.label = label
        self.root = frozenset(name for name in repository.files if "/" not in name)

    @cached_property
    def _by_folder(self) -> dict[str, list[str]]:
        """The files below each folder of the root."""
        found: dict[str, list[str]] = {}
        for name in self._repository.files:
            found.setdefault(name.partition("/")[0], []).append(name)
        return found

    def files_under(self, folder: str) -> list[str]:
        files = self._by_folder.get(folder.partition("/")[0], [])
        return [name for name in files if name.startswith(f"{folder}/")]

    def read(self, name: str) -> dict[str, Any] | list[Any]:
        n_bytes = self._repository.files[name].n_bytes
        check_config_bytes(name, n_bytes)
        directory = fetch_small_files(self._repository, [name], self._cache_dir)
        return read_config_value(found_file(directory, name))


def _listed(repository: Repository, weight_map: dict[str, str], index_name: str) -> list[str]:
    names = sorted(set(weight_map.values()))
    for name in names:
        if name not in repository.files:
            raise CorruptFileError(
                f"'{index_name}' of {quoted(repository.name)} names shard {quoted(name)}, which is not there",
                "name another --revision of the repository; this one is incomplete",
            )
    return names


def _read_shard(file: HubFile, directory: Path) -> SourceShard:
    def attempt() -> SourceShard:
        try:
            return _read_header(file, directory)
        except CorruptFileError as error:
            raise TransientError("a bad header", max_failures=_MAX_HEADER_READS, final=error) from None

    return retrying(attempt, RetryBudget(file.subject))


def _read_header(file: HubFile, directory: Path) -> SourceShard:
    header = HeaderFile(file)
    opened = io.BufferedReader(header, 4096)  # whose `read` returns all bytes asked for
    if file.name.endswith(".safetensors"):
        tensors = find_safetensors_tensors(opened, file.n_bytes, file.name)
    else:
        tensors = find_pickle_tensors(opened, file.n_bytes, file.name, is_remote=True)
    return SourceShard(directory / file.name, file.n_bytes, tensors, RemoteShard(file, header.digests()))
