"""A line of limited speed that all connections share."""

from __future__ import annotations

import threading
import time


class Bandwidth:
    """Lets bytes pass at `bytes_per_s` in all, or at once while that is None."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._free_at = 0.0
        self._lock = threading.Lock()

    def chunk_bytes(self, at_most: int) -> int:
        """Bytes to send at once: about a fiftieth of a second's worth, so that a slow line flows and does not jerk."""
        return at_most if self.bytes_per_s is None else max(1024, min(at_most, int(self.bytes_per_s / 50)))

    def wait(self, n_bytes: int) -> None:
        """Sleep until the line has had the time for `n_bytes` more."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + n_bytes / self.bytes_per_s
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))
