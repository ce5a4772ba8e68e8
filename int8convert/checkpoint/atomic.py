"""Every file that int8convert writes: whole or not at all, and never through a link.

1. Content goes to a new file under a temporary name, then to the disk, then to its own name by a rename.
2. A directory may be a stranger's, with links named like our files. The temporary name is removed first, a link as a
   link, and opened with O_EXCL and O_NOFOLLOW. A rename replaces a link itself, not the file it leads to.
3. A folder of ours inside such a directory must be a folder; `make_folder` refuses a link. The directory itself may be
   a link, since the user named it.

Nothing else in this package opens a file for writing in a directory that the user named, but for the lock and the
trace.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from int8convert.checkpoint.names import open_regular
from int8convert.errors import DiskFullError, OutputError
from int8convert.text import quoted
from int8convert.trace import span

INCOMPLETE_SUFFIX = ".incomplete"
_LONGEST_KEPT_NAME = 100
"""Bytes of a file name to which the suffix is appended. A longer name is replaced by its digest, since a file system
may take no longer name than the final one."""

MAX_NAME_BYTES = 255
"""Bytes of a file name on nearly every file system of Linux."""

MAX_PATH_BYTES = 4095
"""Bytes of a path that the kernel takes."""


def temporary_path(path: Path) -> Path:
    """Return the path of a file while it is written: never longer than the final name, and in the same folder."""
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= _LONGEST_KEPT_NAME else hashlib.sha256(name).hexdigest()
    return path.with_name(stem + INCOMPLETE_SUFFIX)


def create_file(path: Path, flags: int = 0) -> int:
    """Open a new file for reading and writing; what has the name is removed first, a link as a link."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o644)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all.

    A path that is not UTF-8 reaches Python as lone surrogates, which UTF-8 cannot hold. They become escapes such as
    `\\udce9`, which JSON reads back as the same path.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with open(create_file(temporary_path(path)), "wb") as file:
        file.write(content)
    rename_into_place(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, but not its permissions or times, whole or not at all."""
    with open(open_regular(source), "rb") as original, open(create_file(temporary_path(target)), "wb") as copy:
        shutil.copyfileobj(original, copy)
    rename_into_place(target)


def rename_into_place(path: Path) -> None:
    """Give the temporary file of `path` its name, after its content is on the disk."""
    temporary = temporary_path(path)
    fsync_file(temporary)
    temporary.replace(path)
    fsync_directory(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it exists.

    Raises:
        OutputError: the name belongs to a link, or to anything else but a folder.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path) -> None:
    """Refuse a link, a file or a device in place of a folder that int8convert writes to; a missing one is accepted."""
    try:
        mode = folder.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(mode):
        found = "a link" if stat.S_ISLNK(mode) else "no folder"
        raise OutputError(
            f"'{folder}' is {found}, expected a folder inside '{folder.parent}'",
            "remove it and rerun the same command",
        )


def check_lengths(directory: Path, names: Iterable[str]) -> None:
    """Refuse a directory in which files of these names cannot be made.

    Args:
        names: paths relative to `directory`, with `/`.
    """
    there = next(folder for folder in (directory, *directory.absolute().parents) if os.path.isdir(folder))
    max_name_bytes = min(MAX_NAME_BYTES, os.pathconf(there, "PC_NAME_MAX"))
    for name in names:
        longest = max(len(os.fsencode(part)) for part in name.split("/"))
        n_bytes = len(os.fsencode(directory / name)) + len(INCOMPLETE_SUFFIX)
        if longest > max_name_bytes or n_bytes > MAX_PATH_BYTES:
            raise OutputError(
                f"{quoted(str(directory), 200)} cannot hold {quoted(name, 40)}: a name may have "
                f"{max_name_bytes} bytes and a path {MAX_PATH_BYTES:,}, found {longest:,} and {n_bytes:,}",
                "name another directory with a shorter path, or rename the file",
            )


def as_output_error(error: OSError, out: Path) -> OutputError:
    """Return the error for an OSError in writing to a directory."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"no room left while writing to '{out}'", "make room and rerun the same command")
    return OutputError(
        f"'{error.filename or out}' cannot be written: {error.strerror}", "fix the cause and rerun the same command"
    )


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with span("sync"):
            os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with span("sync"):
            os.fsync(fd)
    finally:
        os.close(fd)
