"""One operation on several cores: its rows in equal parts, one per thread, none of which holds Python's lock.

Every row's result is computed alone and in one order, so the number of threads changes no bit of it. Handing a part to
another thread takes about 20 us, so callers say how much work is worth it. Left out on purpose: Numba's own threads,
whose default layer may not be entered by two threads at once, which is what a server does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cuda_kernels.cpu")


# A forked child has the pool object and none of its threads: it would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def run_split(function: Callable[[int, int], None], n_rows: int, n_threads: int, multiple: int = 1) -> None:
    """Call `function(begin, end)` on consecutive ranges that make up the rows from 0 to before `n_rows`.

    Args:
        n_threads: how many ranges at most, the first of them for the calling thread.
        multiple: every range but the last holds a multiple of this many rows.
    """
    if n_threads == 1:
        function(0, n_rows)
        return
    blocks = -(-n_rows // multiple)
    part = -(-blocks // n_threads) * multiple
    ranges = [(begin, min(begin + part, n_rows)) for begin in range(0, n_rows, part or 1)]
    others = [(_pool().submit(function, *rows), rows) for rows in ranges[1:]]
    if ranges:
        function(*ranges[0])
    for future, rows in others:
        # Where other work keeps the cores busy, a part nobody has begun is done sooner here.
        if future.cancel():
            function(*rows)
        else:
            future.result()
