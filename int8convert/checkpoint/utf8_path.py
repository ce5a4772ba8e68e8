"""Paths for libraries that accept only UTF-8, such as tokenizers and safetensors. A Linux path may be any bytes."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path


def utf8_path(path: str | os.PathLike[str]) -> str:
    """Return a UTF-8 path of the same file: the path itself, or a link that lasts as long as the process."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return _link_to(os.path.abspath(name))
    return name


@functools.cache
def _link_to(path: str) -> str:
    folder = tempfile.mkdtemp(prefix="int8convert-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = Path(folder) / "checkpoint"
    link.symlink_to(path)
    return str(link)
