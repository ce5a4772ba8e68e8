"""Numba's compiler with the settings of every kernel of this package, and a disk cache whose failures are ignored.

Numba keeps compiled code in $NUMBA_CACHE_DIR, beside the source, or in the user's cache folder: in the first that it
can write to. If it can write to none, as in a container without a home, a folder in the temporary directory replaces
them. The cache holds pickled code that runs when it is read, so that folder must belong to this user and be closed to
all others. Without any folder every process compiles again, which takes seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function. If the disk is full or gone, the cache is empty."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with contextlib.suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator of every kernel, which releases the GIL, raises nothing and caches its code on disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, error_model="numpy", **options)(function)
        cache = _find_cache(function)
        if cache is not None:
            dispatcher._cache = cache  # what `cache=True` does, with Numba's own class
        return dispatcher

    return decorate


def _find_cache(function: Callable[..., Any]) -> _Cache | None:
    if config.CACHE_DIR or _has_cache_folder():
        with contextlib.suppress(RuntimeError):  # Numba can write to none of its folders
            return _Cache(function)
    folder = private_folder()
    if folder is None:
        return None
    before, config.CACHE_DIR = config.CACHE_DIR, folder
    try:
        return _Cache(function)
    except RuntimeError:
        return None
    finally:
        config.CACHE_DIR = before


def _has_cache_folder() -> bool:
    """Whether the user's cache folder has an absolute path. For a user without a home Numba would use './~'."""
    return os.path.isabs(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~"))


@functools.cache
def private_folder() -> str | None:
    """A folder in the temporary directory that no other user can write to, or None if it cannot be made.

    Every process of this user gets the same folder, so that later ones find the code. If another user holds its name,
    this process gets a folder of its own, which is removed when the process ends.
    """
    try:
        folder = os.path.join(tempfile.gettempdir(), f"cuda_kernels-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        is_private = stat.S_ISDIR(status.st_mode) and not stat.S_IMODE(status.st_mode) & 0o077
        if is_private and status.st_uid == os.getuid():
            return folder
        folder = tempfile.mkdtemp(prefix="cuda_kernels-")
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
