"""torch's own threads, on which kernels run their parts.

torch's threads spin for a while after each operation. Other threads would share the cores with them: the prompt of a
model took as long on two cores as on one. A spinning thread also starts within 2 microseconds, a sleeping one within 20
to 60.

torch's Linux builds bring GNU OpenMP's library, whose `GOMP_parallel` runs a function on every thread of the caller's
team.
"""

from __future__ import annotations

import ctypes
import os

Team = tuple[int, int, int, int]
"""Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, and the number of threads; the calling thread
alone has the addresses 0."""

ALONE: Team = (0, 0, 0, 1)

_is_forked_child = False


def team(n_threads: int) -> Team:
    """Return the team of the library that `import torch` has loaded; that of the caller if there is no such library."""
    if _is_forked_child or n_threads == 1:
        return ALONE
    if not _FOUND:
        _FOUND.extend(_find())
    return (_FOUND[0], _FOUND[1], _FOUND[2], n_threads) if _FOUND else ALONE


_FOUND: list[int] = []
"""The addresses of the functions; empty until the library is there."""


def _find() -> list[int]:
    process = ctypes.CDLL(None)
    try:
        functions = (process.GOMP_parallel, process.omp_get_thread_num, process.omp_get_num_threads)
    except AttributeError:
        return []
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


def _note_fork() -> None:
    """Mark a forked child, which has none of the team's threads: the library would wait for them forever."""
    global _is_forked_child
    _is_forked_child = True


os.register_at_fork(after_in_child=_note_fork)
