"""Each way a worker can fail reaches the parent as what it is, and not as a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from int8convert.errors import CorruptFileError
from int8convert.runtime.worker_process import Worker, WorkerError

WORKER = r"""
import os, sys, time
from int8convert.errors import CorruptFileError

def answer(request):
    print("what libraries print")
    if request == "refuse":
        raise CorruptFileError("it is short", "fetch it again")
    if request == "raise":
        raise KeyError("odd\nsecond line")
    if request == "panic":
        raise BaseException("a panic of Rust")
    if request == "die":
        sys.stderr.write("first\nlast words\n")
        os._exit(3)
    if request == "hang":
        time.sleep(60)
    return {"got": request}
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    (tmp_path / "own_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Worker("own_worker")


@pytest.mark.parametrize("request_", ["a", ["b", 1], {"c": None}, "ü" * 100_000])
def test_value_comes_back(request_: Any, worker: Worker) -> None:
    assert worker.result(request_) == {"got": request_}


def test_request_may_be_sent_before_the_wait(worker: Worker) -> None:
    worker.send([1, 2])
    assert worker.result() == {"got": [1, 2]}


def test_error_of_ours_is_raised_again_with_its_hint(worker: Worker) -> None:
    with pytest.raises(CorruptFileError, match="it is short") as caught:
        worker.result("refuse")
    assert caught.value.hint == "fetch it again"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("raise", ("KeyError", r"'odd\nsecond line'", "own_worker", 1)),
        ("panic", ("BaseException", "a panic of Rust", "own_worker", 1)),
        ("die", ("", "last words", "", 3)),
    ],
)
def test_other_ends_say_what_happened_and_where(request_: str, expected: tuple[Any, ...], worker: Worker) -> None:
    with pytest.raises(WorkerError) as caught:
        worker.result(request_)
    error = caught.value
    assert (error.exception, error.message, error.module, error.status) == expected


def test_worker_that_cannot_be_imported_says_so() -> None:
    with pytest.raises(WorkerError) as caught:
        Worker("no_such_worker").result({})
    assert caught.value.exception == "ModuleNotFoundError" and "no_such_worker" in caught.value.message


def test_worker_that_takes_too_long_is_stopped(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="did not finish within 1 s") as caught:
        worker.result("hang", limit_s=1)
    assert caught.value.status is None and worker._process.poll() == -9
