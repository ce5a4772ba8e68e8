"""How long trouble that may pass is borne: waits that double, for as long as it is worth it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from int8convert.errors import HubConnectionError

CALL_PATIENCE_S = 20.0
"""For a small request, behind which a user waits."""

TRANSFER_PATIENCE_S = 300.0
"""For weights, behind which nobody waits: without a byte for so long. INT8CONVERT_HUB_PATIENCE changes it."""

FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 600.0


class PassingError(Exception):
    """Trouble that may be over at the next try. Never reaches the user.

    Attributes:
        retry_after_s: what the server asked for; None if it did not.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Patience:
    """How long to go on trying without getting anywhere, and how long to wait in between.

    Args:
        subject: what is being done, for the error: "reading 'model.safetensors' of 'a/b'".
        seconds: from the last progress to giving up; None is CALL_PATIENCE_S.
    """

    def __init__(self, subject: str, seconds: float | None = None) -> None:
        self._subject = subject
        self._seconds = CALL_PATIENCE_S if seconds is None else seconds
        self._wait_s = FIRST_WAIT_S
        self._since = time.monotonic()
        self.n_waits = 0

    def progressed(self) -> None:
        """Bytes have come: begin anew."""
        self._wait_s = FIRST_WAIT_S
        self._since = time.monotonic()

    def wait(self, trouble: PassingError, sleep: Callable[[float], object] = time.sleep) -> None:
        """Sleep before the next try.

        Raises:
            HubConnectionError: patience has run out.
        """
        if trouble.retry_after_s is not None:  # as long as it is asked for: to come earlier would prolong it
            wait_s = min(trouble.retry_after_s, _LONGEST_RETRY_AFTER_S)
        else:
            wait_s = self._wait_s * random.uniform(0.7, 1.3)  # many clients must not come back at one moment
        passed_s = time.monotonic() - self._since
        if passed_s + wait_s > self._seconds:
            raise HubConnectionError(
                f"{self._subject} got no further in {passed_s:.0f} s: {trouble}",
                "see that the network and the Hub are well, and run the same command again",
            )
        self.n_waits += 1
        sleep(wait_s)
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)


def transfer_patience_s() -> float:
    """Seconds without a byte of the weights before giving up."""
    try:
        return float(os.environ.get("INT8CONVERT_HUB_PATIENCE", ""))
    except ValueError:
        return TRANSFER_PATIENCE_S
