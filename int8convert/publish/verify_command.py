"""The options of `int8convert verify` that measure again what verify.json tells of.

Both who measures and who publishes name that command, and neither imports the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_USUAL_GATES = (("max_dnll", 0.01, "--max-dnll"), ("max_kl", 0.01, "--max-kl"))
_USUAL_TASK_GATES = (("min_task_p", 0.001, "--min-task-p"),)


def text_options(text: Mapping[str, Any], file_name: str) -> list[str]:
    """Return what has the models read the same windows of the same text.

    Args:
        text: entry `text` of verify.json.
        file_name: what to call a text of the user's own.
    """
    words = []
    if text.get("dataset"):
        words = ["--dataset", str(text["dataset"])]
    elif not text.get("is_default"):
        words = ["--text", file_name]
    return [*words, "--sequences", str(text.get("n_sequences")), "--length", str(text.get("length"))]


def task_options(names: Iterable[str]) -> list[str]:
    """Return what has the models answer these zero-shot tasks."""
    return ["--level", "tasks", "--tasks", ",".join(dict.fromkeys(names))]


def gate_options(gates: Mapping[str, Any], has_tasks: bool) -> list[str]:
    """Return the gates that are not the usual ones, of the levels that are measured.

    Args:
        gates: entry `gates` of verify.json; numbers, of which infinite ones may be texts.
    """
    known = (*_USUAL_GATES, *(_USUAL_TASK_GATES if has_tasks else ()))
    given = ((option, float(gates.get(name, usual)), usual) for name, usual, option in known)
    return [word for option, limit, usual in given if limit != usual for word in (option, f"{limit:g}")]
