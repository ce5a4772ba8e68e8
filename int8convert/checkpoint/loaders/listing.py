"""The names of a checkpoint's files, and its small JSON files. `hub.open_repository` has the same for a repository."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.json_file import read_config_value
from int8convert.checkpoint.names import CONFIG_NAME, check_inside, find_file, is_loaded_as_weights
from int8convert.errors import CorruptFileError


class Listing(Protocol):
    """The names of a checkpoint's files, and its small files.

    Attributes:
        label: what the user calls the checkpoint.
        root: the names in its root, without folders.
        is_remote: whether it is a repository on the Hub.
    """

    @property
    def label(self) -> str: ...

    @property
    def root(self) -> Collection[str]: ...

    @property
    def is_remote(self) -> bool: ...

    def files_under(self, folder: str) -> Iterable[str]:
        """Return the paths, with `/`, of all files below a folder; none if there is no such folder."""

    def read(self, name: str) -> dict[str, Any] | list[Any]:
        """Return the content of a JSON file that is there.

        Raises:
            SourceError: it is outside the checkpoint, or not JSON.
        """


class DirectoryListing:
    """A `Listing` of a directory. Follows no link out of it.

    Args:
        label: what the user calls it.
    """

    is_remote = False

    def __init__(self, directory: Path, label: str) -> None:
        self.directory = directory
        self.label = label

    @cached_property
    def root(self) -> frozenset[str]:
        """See `Listing`. Includes links that lead nowhere, and folders named like weights: reading them is an error."""
        with os.scandir(self.directory) as entries:
            return frozenset(entry.name for entry in entries if _is_needed(entry.name) or not _is_folder(entry))

    def files_under(self, folder: str) -> Iterator[str]:
        """See `Listing`.

        Raises:
            SourceError: the folder is a link out of the checkpoint.
        """
        if not (self.directory / folder).is_dir():
            return
        check_inside(self.directory / folder, self.directory, folder)
        for parent, folders, names in os.walk(self.directory / folder):
            links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
            for name in (*names, *links):
                yield Path(parent, name).relative_to(self.directory).as_posix()

    def read(self, name: str) -> dict[str, Any] | list[Any]:
        """See `Listing`."""
        path = find_file(self.directory, name)
        if path is None:
            raise CorruptFileError(f"{name!r} is not there any more", "rerun the same command")
        return read_config_value(path)


def _is_needed(name: str) -> bool:
    return name == CONFIG_NAME or is_loaded_as_weights(name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
