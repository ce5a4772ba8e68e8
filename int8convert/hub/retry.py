"""Retries of transient errors: how often, how long, with which waits, and the one log of them.

`int8convert.hub.errors` says which errors are transient. Waits double from FIRST_WAIT_S to half a minute, with jitter,
until the budget is spent. `interrupted` ends every wait in every thread; set it only to end the process.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from int8convert.errors import HubConnectionError, HubError
from int8convert.hub.errors import TransientError, translating_client_errors
from int8convert.text import quoted

retry_log = logging.getLogger(__name__)
interrupted = threading.Event()

CALL_RETRY_S = 20.0
"""Seconds of retries of a small request, for which a user waits."""

TRANSFER_RETRY_S = 300.0
"""Seconds of retries without a byte of a large file. The environment variable below changes it."""

_TRANSFER_VARIABLE = "INT8CONVERT_HUB_RETRY_SECONDS"
FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 30.0
_MIN_LOGGED_S = 3.0
"""Seconds without progress from which waits are logged."""

T = TypeVar("T")


class RetryBudget:
    """Seconds that may pass without progress, and the waits between attempts.

    Args:
        subject: the operation, for the error: "reading 'model.safetensors' of 'a/b'".
        seconds: from the first failure since the last progress; None is CALL_RETRY_S.
        max_asked_s: waits asked for by the server do not count up to this sum; None is `seconds`.
    """

    def __init__(self, subject: str, seconds: float | None = None, max_asked_s: float | None = None) -> None:
        self._subject = subject
        self._seconds = CALL_RETRY_S if seconds is None else seconds
        self._max_asked_s = self._seconds if max_asked_s is None else max_asked_s
        self.progressed()

    def progressed(self) -> None:
        """Restore the full budget and the first wait."""
        self._wait_s = FIRST_WAIT_S
        self._since: float | None = None  # set at the first failure: an attempt may take minutes before it fails
        self._n_failures = 0
        self._asked_s = 0.0

    def wait(self, error: TransientError, sleep: Callable[[float], object] = interrupted.wait) -> None:
        """Sleep before the next attempt.

        Raises:
            HubError: the budget is spent. `error.final` takes its place where it is set.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        self._n_failures = self._n_failures + 1 if error.max_failures is not None else 0
        asked_s = error.retry_after_s
        # Jitter keeps many clients apart. A wait that the server asks for is not shortened: that would prolong it.
        wait_s = asked_s if asked_s is not None else self._wait_s * random.uniform(0.7, 1.3)
        passed_s = now - self._since
        is_free = asked_s is not None and self._asked_s + asked_s <= self._max_asked_s
        counted_s = passed_s if is_free else passed_s + wait_s
        if counted_s > self._seconds or self._n_failures == error.max_failures:
            self._give_up(passed_s, error)
        if passed_s + wait_s > _MIN_LOGGED_S:
            retry_log.warning("%s: %s; retrying in %.0f s", self._subject, error, wait_s)
        sleep(wait_s)
        if interrupted.is_set():
            self._give_up(passed_s, error)
        if is_free:
            self._since += wait_s
            self._asked_s += wait_s
        self._wait_s = min(2 * self._wait_s, _MAX_WAIT_S)

    def _give_up(self, passed_s: float, error: TransientError) -> NoReturn:
        raise error.final or HubConnectionError(
            f"{self._subject} made no progress for {passed_s:.0f} s: {error}",
            "check the network connection, then rerun the same command",
        )


def transfer_budget(subject: str, max_asked_s: float | None = None) -> RetryBudget:
    """Return the budget of a large file or a commit.

    Raises:
        HubError: the environment variable is not a number of seconds.
    """
    asked = os.environ.get(_TRANSFER_VARIABLE)
    try:
        return RetryBudget(subject, float(asked) if asked else TRANSFER_RETRY_S, max_asked_s)
    except ValueError:
        raise HubError(
            f"{_TRANSFER_VARIABLE} is {quoted(asked or '')}, expected a number of seconds",
            "set it to a number, or unset it",
        ) from None


def retrying(attempt: Callable[[], T], budget: RetryBudget, sleep: Callable[[float], object] = interrupted.wait) -> T:
    """Return the result of `attempt`, repeated after each TransientError while the budget lasts.

    Every retry of this package happens here.

    Args:
        attempt: must bear repetition.

    Raises:
        HubError: the budget is spent.
    """
    while True:
        try:
            return attempt()
        except TransientError as error:
            failure = error
        budget.wait(failure, sleep)


def call_hub(call: Callable[[], T], budget: RetryBudget, repository: str) -> T:
    """Return the result of a call of huggingface_hub or its HTTP client, with its errors translated, with retries.

    Raises:
        HubError: an error is permanent, or the budget is spent.
    """

    def attempt() -> T:
        with translating_client_errors(repository):
            return call()

    return retrying(attempt, budget)
