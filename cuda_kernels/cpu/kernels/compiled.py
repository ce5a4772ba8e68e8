"""Numba's compiler with the settings of every kernel of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator of every kernel. Numba then refuses code that makes arrays, which needs its own runtime."""

    def decorate(function: Callable[..., Any]) -> Any:
        return njit(nogil=True, error_model="numpy", _nrt=False, **options)(function)

    return decorate
