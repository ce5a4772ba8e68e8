"""A line of limited speed that all connections share, and that can stand still at a given byte."""

from __future__ import annotations

import threading
import time

_PAUSE_S = 120
"""Of a wait for a pause, or of one that nobody ends: a test that forgets is not to hang."""


class Bandwidth:
    """Lets bytes pass at `bytes_per_s` in all, or at once while that is None.

    Attributes:
        passed_bytes: bodies' bytes that were let through so far, both ways.
    """

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self.passed_bytes = 0
        self._free_at = 0.0
        self._lock = threading.Lock()
        self._pause_at: int | None = None
        self._stands, self._may_go_on = threading.Event(), threading.Event()

    def chunk_bytes(self, at_most: int) -> int:
        """Bytes to send at once: about a fiftieth of a second's worth, so that a slow line flows and does not jerk."""
        return at_most if self.bytes_per_s is None else max(1024, min(at_most, int(self.bytes_per_s / 50)))

    def wait(self, n_bytes: int) -> None:
        """Sleep until the line has had the time for `n_bytes` more."""
        with self._lock:
            if self._pause_at is not None and self.passed_bytes + n_bytes > self._pause_at:
                self._pause_at = None
                self._stands.set()
                self._may_go_on.wait(_PAUSE_S)
            self.passed_bytes += n_bytes
            if self.bytes_per_s is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + n_bytes / self.bytes_per_s
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))

    def pause_before(self, n_bytes: int) -> None:
        """Let `n_bytes` more pass, or a little less, and then nothing until `go_on`: places in a transfer that are
        the same however busy the machine is."""
        with self._lock:
            self._stands.clear()
            self._may_go_on.clear()
            self._pause_at = self.passed_bytes + n_bytes

    def await_pause(self) -> None:
        """Return when the line stands still."""
        assert self._stands.wait(_PAUSE_S), "fewer bytes passed"

    def go_on(self) -> None:
        """End the pause."""
        self._may_go_on.set()
