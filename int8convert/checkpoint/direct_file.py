"""A new file of known size, written by several threads in nearly any order, around the page cache, and hashed.

What is written is gathered in aligned chunks. A thread of the file writes a full chunk to the disk in one direct write.
Meanwhile the thread that filled it hashes it, which is cheapest while it is in the core's cache. So threads that
compute wait for the disk only while there is no room for another full chunk.

Through the page cache, each GB costs a second of CPU time and more on a virtual machine, where a fresh page is dear;
directly, 0.05 s. And it would push the source out of the memory it is read from.

Where the file system does not know direct writes, the same chunks are written through the page cache, and the kernel
is told to begin at once to bring them to the disk.

Memory: the chunks that are begun and not full - one for each place in the file where writing goes on - and at most
`MAX_FULL` that are full and not yet both written and hashed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from int8convert.checkpoint.atomic import create_file
from int8convert.checkpoint.hashing import OrderedSha256
from int8convert.trace import span

CHUNK_BYTES = 2 << 20
MAX_FULL = 16
_MAX_UNHASHED = 8
"""Most full chunks that wait for one before them which is not full. The rest is read back and hashed at the end."""

_N_WRITERS = 4
"""Threads of a file. With one write at a time, the disk would wait between two."""

_ALIGNMENT = 4096
"""Alignment of direct writes in bytes: a multiple of every disk's block size."""


class _Chunk:
    """Part of the file in memory, aligned by a memory map.

    Attributes:
        n_left: bytes that are missing.
        n_users: of writing and hashing, how many are not done with it.
    """

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, CHUNK_BYTES)
        self.n_bytes = self.n_left = self.n_users = 0


class DirectFile:
    """A file of which every byte is written once. Ends by `finish` or `discard`.

    Args:
        path: the file, made new. Its room is reserved at once, so that a full disk shows before the work is done.
        n_bytes: of the whole file.
    """

    def __init__(self, path: Path, n_bytes: int) -> None:
        self._path = path
        self._n_bytes = self._n_left = n_bytes
        self._lock = threading.Lock()
        self._begun: dict[int, _Chunk] = {}
        self._free: list[_Chunk] = []
        self._waiting: dict[int, _Chunk] = {}
        self._n_hashed = 0
        self._is_hashing = False
        self._writers = ThreadPoolExecutor(_N_WRITERS, "writer")
        self._room = threading.BoundedSemaphore(MAX_FULL)
        self._error: BaseException | None = None
        self._fd = _open_direct(path)
        try:
            with span("reserve"):
                _reserve(self._fd, n_bytes)
            self._hash = OrderedSha256(path)
        except BaseException:
            os.close(self._fd)
            path.unlink()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Take bytes to write where none have been written. Thread-safe.

        Raises:
            OSError: these bytes, or some before them, cannot be written.
        """
        while len(data):
            index, begin = divmod(offset, CHUNK_BYTES)
            n = min(len(data), CHUNK_BYTES - begin)
            chunk = self._chunk(index)
            chunk.buffer[begin : begin + n] = data[:n]
            with self._lock:
                chunk.n_left -= n
                is_full = chunk.n_left == 0
                if is_full:
                    del self._begun[index]
                    self._n_left -= chunk.n_bytes
            if is_full:
                self._room.acquire()
                self._raise_error()
                self._writers.submit(self._put, index, chunk)
                self._hash_in_order(index, chunk)
            offset += n
            data = data[n:]

    def _chunk(self, index: int) -> _Chunk:
        with self._lock:
            if index not in self._begun:
                n_bytes = min(CHUNK_BYTES, self._n_bytes - index * CHUNK_BYTES)
                chunk = self._free.pop() if self._free else _Chunk()
                chunk.n_left = chunk.n_bytes = n_bytes
                chunk.n_users = 2
                self._begun[index] = chunk
            return self._begun[index]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _release(self, chunk: _Chunk) -> None:
        """Reuse a chunk after its last user."""
        with self._lock:
            chunk.n_users -= 1
            if chunk.n_users:
                return
            self._free.append(chunk)
        self._room.release()

    def _put(self, index: int, chunk: _Chunk) -> None:
        """Write a full chunk, in a thread of the file. Keeps an error for the threads that compute."""
        try:
            if self._error is None:
                self._write(index, chunk)
        except BaseException as error:
            self._error = error
        finally:
            self._release(chunk)

    def _write(self, index: int, chunk: _Chunk) -> None:
        """Write a full chunk; the last one with a tail of zeros, which `finish` cuts off."""
        data = memoryview(chunk.buffer)[: -(-chunk.n_bytes // _ALIGNMENT) * _ALIGNMENT]
        done = 0
        while done < len(data):
            try:
                with span("write", chunk.n_bytes - done):
                    done += os.pwrite(self._fd, data[done:], index * CHUNK_BYTES + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not _is_direct(self._fd):
                    raise
                _turn_off_direct(self._fd)  # opening was allowed, writing is not
        if not _is_direct(self._fd):
            os.posix_fadvise(self._fd, index * CHUNK_BYTES, done, os.POSIX_FADV_DONTNEED)  # begins to write dirty pages

    def _hash_in_order(self, index: int, chunk: _Chunk) -> None:
        """Hash a full chunk once all chunks before it are hashed. One thread hashes the waiting chunks of all."""
        with self._lock:
            self._waiting[index] = chunk
            if self._is_hashing:
                return
            self._is_hashing = True
        while True:
            with self._lock:
                following = self._waiting.pop(self._n_hashed, None)
                if following is None:
                    self._is_hashing = False
                    unhashed = [self._waiting.pop(i) for i in sorted(self._waiting)[_MAX_UNHASHED:]]
                    break
            self._hash.feed(memoryview(following.buffer)[: following.n_bytes], self._n_hashed * CHUNK_BYTES)
            with self._lock:
                self._n_hashed += 1
            self._release(following)
        for chunk in unhashed:
            self._release(chunk)

    def finish(self) -> str:
        """Put everything on the disk; return the file's sha256 in hex. Call it after all writes.

        Raises:
            OSError: some bytes cannot be written.
        """
        if self._n_left:
            raise ValueError(f"not every byte of '{self._path.name}' was written")
        self._writers.shutdown()
        self._raise_error()
        os.ftruncate(self._fd, self._n_bytes)
        with span("sync"):
            os.fsync(self._fd)
        sha256 = self._hash.finish()
        self._close()
        return sha256

    def discard(self) -> None:
        """Remove the file. Harmless after `finish`, which keeps it."""
        if self._fd >= 0:
            self._close()
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        self._writers.shutdown(cancel_futures=True)
        self._hash.close()
        os.close(self._fd)
        self._fd = -1


def _open_direct(path: Path) -> int:
    try:
        return create_file(path, os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return create_file(path)


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _turn_off_direct(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _reserve(fd: int, n_bytes: int) -> None:
    """Reserve room for a file; where the file system cannot, at least give it its size."""
    try:
        os.posix_fallocate(fd, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, n_bytes)
