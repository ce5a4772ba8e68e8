"""Write half as many bytes as SRC has past the page cache: what the disk alone takes for int8 weights."""

import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 2 << 20
N_THREADS = 4


def main(src: Path, out: Path) -> None:
    """Write the beginning of the largest file of SRC again and again, by several threads."""
    weights = max(src.iterdir(), key=lambda path: path.stat().st_size)
    chunk = mmap.mmap(-1, CHUNK_BYTES)  # aligned, as direct writes need it
    with weights.open("rb") as file:
        file.readinto(chunk)
    n_chunks = sum(path.stat().st_size for path in src.iterdir()) // 2 // CHUNK_BYTES
    out.mkdir()
    fd = os.open(out / "data", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, n_chunks * CHUNK_BYTES)
    with ThreadPoolExecutor(N_THREADS) as threads:
        for n in threads.map(lambda i: os.pwrite(fd, chunk, i * CHUNK_BYTES), range(n_chunks)):
            if n != CHUNK_BYTES:
                raise SystemExit("the disk is full")
    os.fsync(fd)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
