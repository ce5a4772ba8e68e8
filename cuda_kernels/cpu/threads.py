"""One operation on several threads of Python's: its rows in equal parts, one per thread.

Kernels that release the GIL run at the same time there. Starting a part takes 20 to 60 us, so kernels prefer torch's
own threads; see `team`. Numba's threads are left out on purpose: two threads at once, as in a server, may not enter
their default layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cuda_kernels.cpu")


# A forked child has the pool object but none of its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def run_split(function: Callable[[int, int], None], n_rows: int, n_threads: int, multiple: int = 1) -> None:
    """Call `function(begin, end)` on consecutive ranges that make up the rows from 0 to before `n_rows`.

    Args:
        n_threads: the most ranges; the calling thread takes the first.
        multiple: every range but the last holds a multiple of this many rows.
    """
    if n_threads == 1:
        function(0, n_rows)
        return
    blocks = -(-n_rows // multiple)
    part = -(-blocks // n_threads) * multiple
    ranges = [(begin, min(begin + part, n_rows)) for begin in range(0, n_rows, part or 1)]
    others = [(_pool().submit(function, *rows), rows) for rows in ranges[1:]]
    try:
        if ranges:
            function(*ranges[0])
        # If other work keeps the cores busy, a part that no thread has begun is done sooner here.
        for future, rows in others:
            if future.cancel():
                function(*rows)
    finally:
        # Parts that run use memory of the caller's, whatever became of the others.
        wait([future for future, _ in others if not future.cancel()])
    for future, _ in others:
        if not future.cancelled():
            future.result()
