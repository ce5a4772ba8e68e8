"""Normalizes forms of one config.json by transformers' own class, in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from int8convert.errors import Int8ConvertError
from int8convert.runtime.worker_process import Worker, WorkerError

LIMIT_S = 120.0
"""Seconds until the child is stopped."""


def as_loaded(configs: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return configs as transformers reads them; unchanged if it knows no class of the model, or the class refuses."""
    plain = [dict(config) for config in configs]
    worker = Worker("int8convert.verification.exact.as_loaded_worker")
    try:
        found: list[dict[str, Any]] = worker.result(plain, LIMIT_S)
    except (WorkerError, Int8ConvertError):
        return plain
    finally:
        worker.stop()
    return found
