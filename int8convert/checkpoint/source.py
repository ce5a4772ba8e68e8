"""The types of a checkpoint that is read: its config, its shards and its auxiliary files.

A source lists its shards with the tensors in them, from headers alone, and opens one shard at a time for reading. It is
a directory (`checkpoint.directory`) or a repository (`hub.open_repository`): a repository's small files are in the
Hub's cache, and its shards stay on the Hub until they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.file_reader import FileIdentity, FileReader
from int8convert.checkpoint.loaders.shard_index import AS_INDEXED, IndexDifferences
from int8convert.checkpoint.names import CONFIG_NAME
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import SourceError
from int8convert.text import quoted


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


@contextmanager
def reading(file_name: str) -> Iterator[None]:
    """Raise a SourceError for an OSError in the body, which reads a file of the source."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{quoted(file_name)} of the source cannot be read: {error.strerror}",
            "check that you may read the source and that its disk works, then rerun the same command",
        ) from error


class RemoteFile(Protocol):
    """A file on the Hub, at one commit.

    sha256: of its content, in hex; None if the Hub does not know it, as of small files outside of LFS.
    """

    @property
    def sha256(self) -> str | None: ...

    def open(self) -> ShardReader: ...

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch byte ranges, each a first byte and the one after the last, for later reads of just these.

        They are compared when the whole file comes, see `int8convert.checkpoint.shard_access`.
        """

    def refetch_matches(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Fetch ranges again; return whether their bytes are the same. If not, forget them."""


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


def fetch_tensors(tensors: Iterable[tuple[SourceShard, StoredTensor]]) -> None:
    """Fetch small tensors that are on the Hub, by few requests for each shard. Readers of the shard then have them."""
    ranges: dict[str, tuple[RemoteFile, list[tuple[int, int]]]] = {}
    for shard, stored in tensors:
        if shard.remote is not None:
            span = stored.offset, stored.offset + stored.span_bytes
            ranges.setdefault(shard.path.name, (shard.remote, []))[1].append(span)
    for remote, wanted in ranges.values():
        remote.fetch(wanted)


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint to read.

    Attributes:
        label: the source as the user named it.
        directory: where its small files are.
        config: the config that transformers reads, see `loaders.config`; {} where there is none.
        auxiliary_files: small files that are copied unchanged, such as the tokenizer.
        commit: of the repository on the Hub that `label` names; None of a directory.
        notes: messages on files that are not converted.
        has_adapter: whether an adapter is beside the weights. It is not merged into them.
        index: where the index and the weight files differ; the shards hold what loaders take.
        config_name: the file `config` was read from.
        index_dtype: what the index says of the weights' dtype, as a stranger wrote it.
    """

    label: str
    directory: Path
    config: dict[str, Any] = field(repr=False)
    shards: tuple[SourceShard, ...] = field(repr=False)
    auxiliary_files: tuple[Path, ...] = field(repr=False)
    commit: str | None = None
    notes: tuple[str, ...] = ()
    has_adapter: bool = False
    index: IndexDifferences = field(default=AS_INDEXED, repr=False)
    config_name: str = CONFIG_NAME
    index_dtype: str | None = None

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.n_bytes for shard in self.shards)
