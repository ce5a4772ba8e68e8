"""Where OUT may be."""

from __future__ import annotations

import os
from pathlib import Path

from int8convert.checkpoint.loaders.files import is_auxiliary_folder
from int8convert.checkpoint.names import OWN_FOLDER
from int8convert.errors import OutputError


def check_place(out: Path, source: Path) -> None:
    """Check that a directory can be written that is not part of the source.

    Raises:
        OutputError: it is the source, holds it, is among its files, is a file, or may not be written to.
    """
    resolved, source = out.resolve(), source.resolve()
    # Compared by inode too: one directory may be mounted in two places.
    if any(_is_same(resolved, folder) for folder in (source, *source.parents)):
        raise OutputError(f"OUT '{out}' is the source itself, or holds it", "name another directory")
    inner = next((folder for folder in (resolved, *resolved.parents) if _is_same(folder.parent, source)), None)
    if inner is not None and (inner.name == OWN_FOLDER or is_auxiliary_folder(inner.name)):
        raise OutputError(
            f"OUT '{out}' is in '{inner.name}', a folder of the source's own files",
            "name a directory outside of the source",
        )
    if out.exists() and not out.is_dir():
        raise OutputError(f"OUT '{out}' is a file", "name a directory")
    parent = next(p for p in (resolved, *resolved.parents) if p.is_dir())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"OUT '{out}' cannot be written to: no permission in '{parent}'", "name a directory you may write to"
        )


def _is_same(folder: Path, other: Path) -> bool:
    try:
        return folder == other or folder.samefile(other)
    except OSError:  # one of them does not exist
        return False
