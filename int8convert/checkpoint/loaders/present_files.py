"""Lists the files in a checkpoint's directory. Follows no link out of it, and opens no pipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from int8convert.checkpoint.atomic import INCOMPLETE_SUFFIX
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.names import find_file
from int8convert.errors import SourceError


@dataclass(frozen=True, slots=True)
class PresentFiles:
    """The files of a directory and of its folders.

    Attributes:
        files: path in the directory, with `/` -> location of a regular file of the checkpoint.
        refused: path of any other entry -> reason: a link to a folder or out of the checkpoint, a pipe, a device.
    """

    files: Mapping[str, Path] = field(repr=False)
    refused: Mapping[str, str]


def find_present(directory: Path) -> PresentFiles:
    """List a directory and its folders.

    Raises:
        OSError: the directory itself cannot be listed.
    """
    files: dict[str, Path] = {}
    refused: dict[str, str] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            names = sorted(os.listdir(directory / folder))
        except OSError as error:
            if not folder:
                raise
            refused[folder.rstrip("/")] = f"a folder that cannot be listed: {error.strerror}"
            continue
        for name in (folder + entry for entry in names if is_listed(folder + entry)):
            path = directory / name
            if path.is_symlink() and path.is_dir():
                refused[name] = "a link to a folder"
            elif path.is_dir():
                folders.append(f"{name}/")
            else:
                _sort_in(directory, name, files, refused)
    return PresentFiles(dict(sorted(files.items())), dict(sorted(refused.items())))


def _sort_in(directory: Path, name: str, files: dict[str, Path], refused: dict[str, str]) -> None:
    try:
        path = find_file(directory, name)
    except SourceError as error:
        refused[name] = error.message.partition(" is ")[2] or error.message
        return
    if path is not None:
        files[name] = path


def is_listed(name: str) -> bool:
    """Return whether a file is listed. Unfinished files, and hidden files that no loader reads, are not."""
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not name.endswith(INCOMPLETE_SUFFIX) and not (is_hidden and is_inert(name))
