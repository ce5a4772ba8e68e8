"""One operation on several cores: its rows in equal parts, one per thread, without the GIL.

Every row's result is computed alone and in one order, so the number of threads changes no bit of it. Parts run on
torch's own threads if `team` can reach them, else in a pool. Starting a part takes 20 to 60 us there, so callers state
how many parts the work is worth. Numba's own threads are left out on purpose: two threads at once, as in a server, may
not enter their default layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from cuda_kernels.cpu.compiled import compiled
from cuda_kernels.cpu.team import team


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cuda_kernels.cpu")


# A forked child has the pool object but none of its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


@compiled()
def part_of(n_rows, multiple, part, n_parts):  # type: ignore[no-untyped-def]
    """The range (begin, end) of one of `n_parts` equal parts; all but the last hold a multiple of `multiple` rows."""
    blocks = -(-n_rows // multiple)
    size = -(-blocks // n_parts) * multiple
    return min(part * size, n_rows), min((part + 1) * size, n_rows)


def run_parts(kernel: Any, on_team: Any, args: tuple[Any, ...], n_worth: int, n_threads: int) -> None:
    """Call `kernel(*args, part, n_parts)` for all parts.

    Args:
        kernel: compiled, and raises nothing.
        on_team: the compiled `run_on_team(kernel, args, n_parts, n_threads, team)`.
        n_worth: the most parts that pay for their start.
        n_threads: threads of torch's team.
    """
    n_parts = min(n_worth, n_threads)
    if n_parts == 1:
        kernel(*args, 0, 1)
    elif (found := team()) is not None:
        on_team(args, n_parts, n_threads, found)
    else:
        run_split(lambda part, _: kernel(*args, part, n_parts), n_parts, n_parts)


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
    if ranges:
        function(*ranges[0])
    for future, rows in others:
        # If other work keeps the cores busy, a part that no thread has begun is done sooner here.
        if future.cancel():
            function(*rows)
        else:
            future.result()
