"""How long trouble that may pass is borne: waits that double, for as long as it is worth it.

Waits that a person would notice are told to the logger of this module's name, `tells`. `interrupted` ends all of them,
in whichever thread: who sets it is about to end the process.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from int8convert.errors import HubConnectionError, HubError
from int8convert.text import quoted

tells = logging.getLogger(__name__)
interrupted = threading.Event()

CALL_PATIENCE_S = 20.0
"""For a small request, behind which a user waits."""

TRANSFER_PATIENCE_S = 300.0
"""For weights, behind which nobody waits: without a byte for so long. INT8CONVERT_HUB_PATIENCE changes it."""

FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_TOLD_FROM_S = 3.0
"""Shorter waits are nobody's business."""


class PassingError(Exception):
    """Trouble that may be over at the next try. Never reaches the user.

    Attributes:
        retry_after_s: what the server asked for; None if it did not.
        most_times: how often in a row it may be met; None as long as patience lasts.
        is_refusal: the server did nothing of what it was asked for; if not, it may have, and the answer got lost.
    """

    def __init__(
        self,
        reason: str,
        retry_after_s: float | None = None,
        *,
        most_times: int | None = None,
        is_refusal: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.most_times = most_times
        self.is_refusal = is_refusal


class Patience:
    """How long to go on trying without getting anywhere, and how long to wait in between.

    Args:
        subject: what is being done, for the error: "reading 'model.safetensors' of 'a/b'".
        seconds: from the first trouble since the last progress to giving up; None is CALL_PATIENCE_S.
        most_asked_s: waits that the server asks for do not count as long as they come to no more than this; None is
            `seconds`.
    """

    def __init__(self, subject: str, seconds: float | None = None, most_asked_s: float | None = None) -> None:
        self._subject = subject
        self._seconds = CALL_PATIENCE_S if seconds is None else seconds
        self._most_asked_s = self._seconds if most_asked_s is None else most_asked_s
        self.progressed()

    def progressed(self) -> None:
        """Bytes have come: begin anew."""
        self._wait_s = FIRST_WAIT_S
        self._since: float | None = None  # a try may take minutes before it fails, which are none of patience
        self._n_times = 0
        self._asked_s = 0.0

    def wait(self, trouble: PassingError, sleep: Callable[[float], object] = interrupted.wait) -> None:
        """Sleep before the next try.

        Raises:
            HubConnectionError: patience has run out.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        self._n_times = self._n_times + 1 if trouble.most_times is not None else 0
        asked_s = trouble.retry_after_s
        # Many clients must not come back at one moment; nor earlier than asked for, which would prolong it.
        wait_s = asked_s if asked_s is not None else self._wait_s * random.uniform(0.7, 1.3)
        passed_s = now - self._since
        is_borne = asked_s is not None and self._asked_s + asked_s <= self._most_asked_s
        counted_s = passed_s if is_borne else passed_s + wait_s
        if counted_s > self._seconds or self._n_times == trouble.most_times:
            self._give_up(passed_s, trouble)
        if passed_s + wait_s > _TOLD_FROM_S:
            tells.warning("%s: %s; trying again in %.0f s", self._subject, trouble, wait_s)
        sleep(wait_s)
        if interrupted.is_set():
            self._give_up(passed_s, trouble)
        if is_borne:
            self._since += wait_s
            self._asked_s += wait_s
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    def _give_up(self, passed_s: float, trouble: PassingError) -> NoReturn:
        raise HubConnectionError(
            f"{self._subject} got no further in {passed_s:.0f} s: {trouble}",
            "check the network connection, then rerun the same command",
        )


def transfer_patience_s() -> float:
    """Seconds without a byte of the weights before giving up.

    Raises:
        HubError: the environment says something that is no number of seconds.
    """
    asked = os.environ.get("INT8CONVERT_HUB_PATIENCE")
    if not asked:
        return TRANSFER_PATIENCE_S
    try:
        return float(asked)
    except ValueError:
        raise HubError(
            f"INT8CONVERT_HUB_PATIENCE is {quoted(asked)}, expected a number of seconds", "set it to one, or unset it"
        ) from None
