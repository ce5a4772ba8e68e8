"""Files that are there whole or not at all, also after a power cut: temporary name, fsync, rename, directory fsync."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INCOMPLETE_SUFFIX = ".incomplete"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 so that it is there whole or not at all."""
    temporary = path.with_name(path.name + INCOMPLETE_SUFFIX)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content so that it is there whole or not at all; not its permissions or times."""
    temporary = target.with_name(target.name + INCOMPLETE_SUFFIX)
    shutil.copyfile(source, temporary)
    fsync_file(temporary)
    temporary.replace(target)


def fsync_file(path: Path) -> None:
    """Put a file's content on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    """Make the renames in a directory survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
