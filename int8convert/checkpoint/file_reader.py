"""Reads local files by `pread`, and only while they are the files whose headers were read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from int8convert.checkpoint.names import open_regular
from int8convert.checkpoint.safetensors_file import read_exactly
from int8convert.errors import CorruptFileError
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Identity and state of the file at a path.

    Attributes:
        device, inode: the file's place on its disk; another file of the same name has another.
    """

    device: int
    inode: int
    n_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int | Path) -> FileIdentity:
        """Return the identity of a path's file, or of an open one by its descriptor."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def check(self, file: int | Path, name: str) -> None:
        """Compare a file with the one that this identity was taken of.

        Raises:
            CorruptFileError: it is another file, or was changed.
        """
        found = FileIdentity.of(file)
        if found == self:
            return
        is_other = (found.device, found.inode) != (self.device, self.inode)
        sizes = f": it had {self.n_bytes:,} bytes, it has {found.n_bytes:,}" if found.n_bytes != self.n_bytes else ""
        raise CorruptFileError(
            f"{quoted(name)} was {'replaced by another file' if is_other else 'changed'} since its header was read"
            f"{sizes}",
            "leave the checkpoint alone while it is read, and rerun the same command",
        )


def open_unchanged(path: Path, identity: FileIdentity | None) -> int:
    """Open a file for reading; return its descriptor.

    Does not wait where a named pipe has taken the file's place.

    Args:
        identity: what the file must be; None takes any.

    Raises:
        CorruptFileError: it is no file, another file, or was changed.
    """
    fd = open_regular(path)
    try:
        if identity is not None:
            identity.check(fd, path.name)
    except BaseException:
        os.close(fd)
        raise
    return fd


class FileReader:
    """A `ShardReader` of a file.

    Uses `pread`, not a memory map: a file that shrinks under a map kills the process with SIGBUS, and copying from
    the page cache into a buffer that stays in the core's cache costs less than the page faults do.

    Raises:
        CorruptFileError: it is another file, or was changed.
    """

    def __init__(self, path: Path, identity: FileIdentity | None = None) -> None:
        self._name = path.name
        self._fd = open_unchanged(path, identity)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        read_exactly(self._fd, buffer, offset, self._name)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
