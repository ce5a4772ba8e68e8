"""Tests whether an int8 checkpoint runs, without its weights, in a child process (`trial_run_worker`).

A model that loads may still fail or compute garbage: code that casts an input to the dtype of a weight casts it to
int8. The child runs beside the comparison of the weights. It takes a few seconds to import transformers, and little
memory, whatever the model's size.
"""

from __future__ import annotations

from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import SourceError
from int8convert.formats.config import read_format
from int8convert.formats.modules import module_of
from int8convert.runtime.worker_process import Worker, WorkerError
from int8convert.text import quoted
from int8convert.verification.checks import Check, Finding, make_check

LIMIT_S = 600.0
"""Seconds until the child is stopped: an untrusted config may describe an endless model."""


class TrialRun:
    """Runs a few tokens through a checkpoint's model. Starting it returns at once; `result` waits.

    Does not know what the model computes, as it reads no weights. Does not test layers that a text does not reach.
    """

    def __init__(self, out: CheckpointSource, trusts_code: bool) -> None:
        found = read_format(out.config)
        self._request = {"directory": str(out.directory), "format": str(found), "trusts_code": trusts_code}
        self._worker = self._start() if module_of(found).SHOWS_CODES else None

    def _start(self) -> Worker | None:
        worker = Worker("int8convert.verification.exact.trial_run_worker")
        worker.send(self._request)
        return worker

    def __enter__(self) -> TrialRun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.stop()

    def result(self) -> tuple[Check, list[str]]:
        """Wait for the check, and for notes on what was not tested.

        Raises:
            SourceError: the child died, or took too long.
        """
        if self._worker is None:
            return make_check("runs", 0, []), []
        try:
            return read_answer(self._worker.result(limit_s=LIMIT_S))
        except WorkerError as error:
            text = f"{error.exception}: {error.message}" if error.exception else error.message
            is_theirs = text and error.status is not None
            reason = quoted(text, 200) if is_theirs else text or f"the process ended with status {error.status}"
            # A check that did not run must not count as passed.
            raise SourceError(
                f"whether the model of config.json runs could not be tested: {reason}",
                "free memory, and run verify again",
            ) from error


def not_tried(reason: str) -> dict[str, Any]:
    return {"n_replaced": 0, "n_called": 0, "found": [], "not_run": reason}


def read_answer(answer: dict[str, Any]) -> tuple[Check, list[str]]:
    findings = [Finding(module, "a module that runs as int8", found) for module, found in answer["found"]]
    check = make_check("runs", answer["n_called"], findings)
    if answer["not_run"]:
        return check, [f"whether its model runs was not tested: without weights, {answer['not_run']}"]
    n_missed = answer["n_replaced"] - answer["n_called"]
    if n_missed > 0:
        return check, [f"a text reaches {answer['n_called']:,} of its int8 layers; {n_missed:,} were not tested"]
    return check, []
