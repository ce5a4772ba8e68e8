"""Opens whatever a user may call a source: a directory, or a repository on the Hub by its name."""

from __future__ import annotations

import os
from pathlib import Path

from int8convert.checkpoint.directory import open_directory
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import HubMissingError, SourceError
from int8convert.hub.repository_name import looks_like_repository, name_of_address
from int8convert.text import quoted


def is_repository_name(src: str | os.PathLike[str]) -> bool:
    """Whether this names a repository on the Hub: it looks like one, and no file or directory has that name."""
    return isinstance(src, str) and looks_like_repository(src) and not Path(src).exists()


def open_source(
    src: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: Path | None = None,
    ignores_adapter: bool = False,
) -> CheckpointSource:
    """Read a checkpoint's config, index and shard headers; no weights. `checkpoint.loaders` says which files these are.

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
        if not Path(src).is_dir():
            found = "a file" if Path(src).exists() else "nothing there"
            raise SourceError(f"{quoted(str(src), 300)} is not a checkpoint directory: {found}", _naming_hint(str(src)))
        return open_directory(Path(src), str(src), ignores_adapter)
    from int8convert.hub.open_repository import open_repository

    try:
        return open_repository(str(src), revision, cache_dir, ignores_adapter)
    except HubMissingError as error:
        if revision is None:  # else a repository is meant
            error.hint += f"; no directory {quoted(str(src), 200)} is here either"
        raise


def _naming_hint(label: str) -> str:
    """What to name in place of something that is no directory."""
    if name := name_of_address(label):
        return f"name it {name}"
    return "give a checkpoint directory, or ORGANIZATION/NAME on the Hub, such as openai-community/gpt2"
