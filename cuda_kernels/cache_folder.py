"""The folder of this user for what is compiled: PTX, and the machine code of the CPU kernels."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path | None:
    """Return `cuda_kernels` in $XDG_CACHE_HOME, by default ~/.cache, or None for a user without a home."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "cuda_kernels" if os.path.isabs(folder) else None


@functools.cache
def temporary_folder() -> Path | None:
    """Return a folder in the temporary directory that no other user can write to; None if it cannot be made.

    Every process of this user gets the same folder, so that later ones find the code. If another user holds its name,
    this process gets a folder of its own, which is removed when the process ends.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"cuda_kernels-{os.getuid()}"
        if is_closed(make_closed(folder)):
            return folder
        folder = Path(tempfile.mkdtemp(prefix="cuda_kernels-"))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_closed(folder: Path) -> Path:
    """Make a folder that no other user can enter, unless something has its name."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    return folder


def is_closed(folder: Path) -> bool:
    """Whether this is a folder, no link, that belongs to this user, and in which nobody else can write."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and belongs_to_this_user(status)


def belongs_to_this_user(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
