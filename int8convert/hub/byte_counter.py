"""Counts bytes downloaded by the Hub client, through its progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SLACK_BYTES = 1 << 20
"""Bytes of slack for tiny files."""


def is_too_long(n_bytes: int, n_listed: int) -> bool:
    """Return whether a server has sent more of a file than it lists.

    Some versions of the client count twice what they fetch again after a broken connection, so only more than twice
    the size is too much.
    """
    return n_bytes > 2 * n_listed + _SLACK_BYTES


def byte_counter(on_bytes: Callable[[int], None]) -> Any:
    """Return a progress bar class for the client that shows nothing and reports the bytes received.

    What `on_bytes` raises ends the download, though not at once.
    """
    from tqdm.auto import tqdm

    class Counter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self._n_received = options.get("initial", 0) or 0

        def update(self, n: float | None = 1) -> None:
            self._n_received += n or 0
            on_bytes(int(self._n_received))

    return Counter
