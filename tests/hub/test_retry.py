"""A retry budget is counted from the last byte, and waits double up to half a minute."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from int8convert.errors import CorruptFileError, HubConnectionError, HubError
from int8convert.hub import retry
from int8convert.hub.errors import TransientError
from int8convert.hub.retry import RetryBudget, retrying


class Clock:
    """Time that only sleeping makes pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: 1.0)
    return clock


def test_waits_double_up_to_half_a_minute(clock: Clock) -> None:
    waiting = RetryBudget("reading", 200)
    with pytest.raises(HubConnectionError, match=r"reading made no progress for 18[0-9] s: gone"):
        while True:
            waiting.wait(TransientError("gone"), clock.sleep)
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]


def test_progress_restores_the_budget_and_the_first_wait(clock: Clock) -> None:
    """A download of hours may meet trouble every few minutes."""
    waiting = RetryBudget("reading", 40)
    for _ in range(20):
        for _ in range(5):
            waiting.wait(TransientError("gone"), clock.sleep)
        waiting.progressed()
    assert clock.slept == [0.5, 1, 2, 4, 8] * 20


def test_waits_the_server_asks_for_count_only_beyond_what_is_borne(clock: Clock) -> None:
    waiting = RetryBudget("the commit", 100, max_asked_s=3600)
    with pytest.raises(HubConnectionError):
        while True:
            waiting.wait(TransientError("later", 900), clock.sleep)
    assert clock.slept == [900] * 4, "an hour in all, and the next one is longer than the budget"


def test_server_that_asks_for_no_wait_is_not_borne_for_ever(clock: Clock) -> None:
    waiting = RetryBudget("reading", 10)
    with pytest.raises(HubConnectionError):
        for _ in range(1000):
            waiting.wait(TransientError("later", 0), clock.sleep)
            clock.now += 1  # of the try
    assert len(clock.slept) == 11


def test_trouble_that_may_be_met_so_often_in_a_row_is_given_up_then(clock: Clock) -> None:
    waiting = RetryBudget("reading", 1e9)
    for _ in range(3):
        waiting.wait(TransientError("old address", max_failures=4), clock.sleep)
    with pytest.raises(HubConnectionError, match="old address"):
        waiting.wait(TransientError("old address", max_failures=4), clock.sleep)
    waiting.progressed()
    for _ in range(9):
        waiting.wait(TransientError("old address", max_failures=2), clock.sleep)
        waiting.wait(TransientError("other trouble"), clock.sleep)


def test_time_of_an_attempt_before_it_fails_is_not_counted(clock: Clock) -> None:
    waiting = RetryBudget("sending", 10)
    clock.now += 3600
    waiting.wait(TransientError("cut"), clock.sleep)
    assert clock.slept == [0.5]


def test_interruption_ends_a_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(retry, "interrupted", interrupted)
    interrupted.set()
    with pytest.raises(HubConnectionError):
        RetryBudget("reading", 1e9).wait(TransientError("later", 3600), interrupted.wait)


def test_attempts_are_repeated_until_one_returns(clock: Clock) -> None:
    outcomes = iter([TransientError("cut"), TransientError("cut"), "content"])

    def attempt() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, TransientError):
            raise outcome
        return str(outcome)

    assert retrying(attempt, RetryBudget("reading", 10), clock.sleep) == "content"
    assert clock.slept == [0.5, 1]


def test_last_of_so_many_failures_raises_the_error_they_stand_for(clock: Clock) -> None:
    final = CorruptFileError("'x' came 3 times with wrong bytes", "check the disk")
    n_attempts = 0

    def attempt() -> None:
        nonlocal n_attempts
        n_attempts += 1
        raise TransientError("wrong bytes", max_failures=3, final=final)

    with pytest.raises(CorruptFileError) as caught:
        retrying(attempt, RetryBudget("fetching", 1e9), clock.sleep)
    assert caught.value is final and n_attempts == 3
    assert caught.value.__context__ is None, "the transient error would show in a traceback"


def test_permanent_error_is_raised_at_once(clock: Clock) -> None:
    def attempt() -> None:
        raise HubError("gated", "accept the terms")

    with pytest.raises(HubError, match="gated"):
        retrying(attempt, RetryBudget("reading", 1e9), clock.sleep)
    assert clock.slept == []


def test_retries_are_in_one_place() -> None:
    """No other module of the package waits for a retry budget, or logs a retry."""
    package = Path(retry.__file__).parent
    users = {
        path.name for path in package.glob("*.py") for word in ("retry_log", "budget.wait(") if word in path.read_text()
    }
    assert users == {"retry.py"}
