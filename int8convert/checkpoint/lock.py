"""One process at a time in one output directory.

Uses `flock`, which ends with its owner however that ends. On a file system without it, the lock is a file that names
its owner; such a lock outlives a killed owner on another host, and then has to be removed by hand.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
from pathlib import Path

from int8convert.checkpoint.atomic import check_folder
from int8convert.errors import OutputError

_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class DirectoryLock:
    """An exclusive lock on a directory, through a file in a folder of ours inside it. A context manager.

    The folder and the file are opened so that a link in a stranger's directory leads nowhere.

    Raises:
        OutputError: another process holds the lock, or a link or a device has the name of the folder or the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> DirectoryLock:
        while True:
            self._fd = self._open()
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._refuse()
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                self._take_by_name()
            if self._is_still_there():
                break
            os.close(self._fd)  # the previous owner removed the file between our opening and locking it
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        except BaseException:  # Ctrl-C, too
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _open(self) -> int:
        check_folder(self._path.parent)
        try:  # a named pipe or a device must not even be opened
            is_ours = stat.S_ISREG(self._path.lstat().st_mode)
        except FileNotFoundError:
            is_ours = True
        fd = -1
        if is_ours:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            is_ours = os.fstat(fd).st_nlink <= 1  # a hard link may be to a private file
        if is_ours:
            return fd
        if fd >= 0:
            os.close(fd)
        raise OutputError(
            f"'{self._path}' is a link or no file, expected the lock of int8convert",
            "remove it and rerun the same command",
        )

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.lstat())
        except FileNotFoundError:
            return False

    def _owner(self) -> tuple[str, int] | None:
        try:
            owner = json.loads(os.pread(self._fd, 1000, 0))
            return str(owner["host"]), int(owner["pid"])
        except (ValueError, KeyError, TypeError):
            return None

    def _take_by_name(self) -> None:
        """Take the lock without flock: it is free if it names no owner, or a process of this host that has ended."""
        owner = self._owner()
        if owner is None:
            return
        host, pid = owner
        if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
            return
        self._refuse()

    def _refuse(self) -> None:
        owner = self._owner()
        os.close(self._fd)
        who = f"process {owner[1]} on {owner[0]}" if owner else "another process"
        raise OutputError(
            f"'{self._path.parent.parent}' is being written by {who}",
            f"wait for it, or name another directory; if it is gone for sure, remove '{self._path}'",
        )
