"""Normalizes forms of one config.json by transformers' own class, in a child process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from int8convert.runtime.worker_process import start_worker

LIMIT_S = 120.0
"""Seconds after which the child is stopped."""


def as_loaded(configs: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return configs as transformers reads them; unchanged if it knows no class of the model, or if that refuses."""
    plain = [dict(config) for config in configs]
    child = start_worker("int8convert.verification.exact.as_loaded_worker")
    try:
        output, _ = child.communicate(json.dumps(plain), timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return plain
    finally:
        child.kill()
        child.wait()
    found: list[dict[str, Any]] = json.loads(output) if child.returncode == 0 else plain
    return found
