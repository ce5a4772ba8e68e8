"""Child process of `as_loaded`: config.json as transformers' own class of the model reads it.

Two versions of transformers write one config in two forms: entries are renamed, gathered or filled in with defaults.
Read by the class, both forms are the same. No code of a checkpoint is run; what the class raises is the answer.
"""

from __future__ import annotations

import json
from typing import Any


def read_as_loaded(config: dict[str, Any]) -> dict[str, Any]:
    """Return all entries of a config as transformers reads it; raises what its class of the model raises."""
    import transformers

    found = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    answer: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return answer


def answer(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [read_as_loaded(config) for config in configs]
