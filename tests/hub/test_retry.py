"""Patience is counted from the last byte, and waits double up to half a minute."""

from __future__ import annotations

import threading

import pytest

from int8convert.errors import HubConnectionError
from int8convert.hub import retry
from int8convert.hub.retry import PassingError, Patience


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
    waiting = Patience("reading", 200)
    with pytest.raises(HubConnectionError, match=r"reading got no further in 18[0-9] s: gone"):
        while True:
            waiting.wait(PassingError("gone"), clock.sleep)
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]


def test_progress_begins_patience_and_waits_anew(clock: Clock) -> None:
    """A download of hours may meet trouble every few minutes."""
    waiting = Patience("reading", 40)
    for _ in range(20):
        for _ in range(5):
            waiting.wait(PassingError("gone"), clock.sleep)
        waiting.progressed()
    assert clock.slept == [0.5, 1, 2, 4, 8] * 20


def test_waits_the_server_asks_for_count_only_beyond_what_is_borne(clock: Clock) -> None:
    waiting = Patience("the commit", 100, most_asked_s=3600)
    with pytest.raises(HubConnectionError):
        while True:
            waiting.wait(PassingError("later", 900), clock.sleep)
    assert clock.slept == [900] * 4, "an hour in all, and the next one is longer than patience"


def test_server_that_asks_for_no_wait_is_not_borne_for_ever(clock: Clock) -> None:
    waiting = Patience("reading", 10)
    with pytest.raises(HubConnectionError):
        for _ in range(1000):
            waiting.wait(PassingError("later", 0), clock.sleep)
            clock.now += 1  # of the try
    assert len(clock.slept) == 11


def test_trouble_that_may_be_met_so_often_in_a_row_is_given_up_then(clock: Clock) -> None:
    waiting = Patience("reading", 1e9)
    for _ in range(3):
        waiting.wait(PassingError("old address", most_times=4), clock.sleep)
    with pytest.raises(HubConnectionError, match="old address"):
        waiting.wait(PassingError("old address", most_times=4), clock.sleep)
    waiting.progressed()
    for _ in range(9):
        waiting.wait(PassingError("old address", most_times=2), clock.sleep)
        waiting.wait(PassingError("other trouble"), clock.sleep)


def test_time_of_a_try_before_it_fails_is_none_of_patience(clock: Clock) -> None:
    waiting = Patience("sending", 10)
    clock.now += 3600
    waiting.wait(PassingError("cut"), clock.sleep)
    assert clock.slept == [0.5]


def test_interruption_ends_a_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = threading.Event()
    monkeypatch.setattr(retry, "interrupted", interrupted)
    interrupted.set()
    with pytest.raises(HubConnectionError):
        Patience("reading", 1e9).wait(PassingError("later", 3600), interrupted.wait)
