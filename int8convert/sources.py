"""Opens the sources that a user can name: directories, and repositories on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from int8convert.checkpoint.directory import open_directory
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import HubMissingError, SourceError
from int8convert.hub.repository import looks_like_repository, name_of_address
from int8convert.text import quoted


def is_repository_name(src: str | os.PathLike[str]) -> bool:
    """Return whether `src` has the form of a repository's name, and no file or directory has that name."""
    return isinstance(src, str) and looks_like_repository(src) and not Path(src).exists()


def open_source(
    src: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: Path | None = None,
    ignores_adapter: bool = False,
) -> CheckpointSource:
    """Read a checkpoint's config, index and shard headers, but no weights. `checkpoint.loaders` chooses the files.

    Args:
        src: a directory; or ORGANIZATION/NAME on the Hub, if no directory has that name.
        revision: the repository's branch, tag or commit.
        cache_dir: the cache for the small files of a repository; None is the Hub's cache.
        ignores_adapter: read the weights alone where an adapter is beside them.

    Raises:
        SourceError: the directory is missing or holds no weights, a file of it is a link that leads elsewhere, or
            loaders would read something that is not converted here.
        CorruptFileError: a file contradicts itself or the index.
        HubError: the repository cannot be read.
    """
    if not is_repository_name(src):
        if not Path(src).is_dir():
            found = "a file" if Path(src).exists() else "nothing there"
            raise SourceError(f"{quoted(str(src), 300)} is not a checkpoint directory: {found}", _naming_hint(str(src)))
        return open_directory(Path(src), str(src), ignores_adapter)
    from int8convert.hub.open_repository import open_repository

    try:
        return open_repository(str(src), revision, cache_dir, ignores_adapter)
    except HubMissingError as error:
        if revision is None:  # with a revision, a repository is meant
            error.hint += f"; no directory {quoted(str(src), 200)} is here either"
        raise


def _naming_hint(label: str) -> str:
    """Return what to name instead."""
    if name := name_of_address(label):
        return f"name it {name}"
    return "give a checkpoint directory, or ORGANIZATION/NAME on the Hub, such as openai-community/gpt2"
