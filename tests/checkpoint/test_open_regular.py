"""Whatever reads a stranger's file reads a file: it waits for no pipe, and opens no device."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from int8convert.checkpoint.atomic import copy_file
from int8convert.checkpoint.directory import read_shard
from int8convert.checkpoint.file_reader import FileReader
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_json_object
from int8convert.checkpoint.names import open_regular
from int8convert.checkpoint.pickle.reader import read_pickle_header
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.errors import CorruptFileError

READERS: list[Callable[[Path], object]] = [
    open_regular,
    FileReader,
    file_sha256,
    read_json_object,
    read_pickle_header,
    read_safetensors_header,
    read_shard,
    lambda path: copy_file(path, path.with_name("copy")),
]


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "socket"])
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    with pytest.raises(CorruptFileError, match=r"model.safetensors' is"):
        read(path)
    assert not list(tmp_path.glob("copy*"))
