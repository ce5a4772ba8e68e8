"""Reads verify.json for the model card: every entry has the type and size that `verify` writes, or none is used.

The file may be a stranger's. The card takes numbers from it unchanged, so they are checked
once, here. Missing entries count as unknown; an early version wrote fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from int8convert.checkpoint.stored_tensor import is_size

_GATES = ("max_dnll", "max_kl", "min_task_p")
_COUNTS = frozenset(
    {
        *("n_int8_weights", "n_different_codes", "n_different_scales", "n_sequences", "length", "n_tokens"),
        *("n_text_tokens", "n_samples", "n_only_reference", "n_only_int8"),
    }
)
_NUMBERS = frozenset(
    {
        *("perplexity", "reference_perplexity", "delta_nll", "mean_kl", "same_top1", "threshold", "outlier_share"),
        *("reference", "int8", "p_value"),
    }
)
_NOT_FINITE = ("inf", "-inf", "nan")
"""Numbers that JSON cannot hold, as verify.json spells them."""


def read_recorded_report(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a parsed verify.json with its gates as numbers; None if `verify` did not write it."""
    gates, exact = report.get("gates", {}), report.get("exact", {})
    text, runs, tasks = report.get("text"), report.get("fidelity", []), report.get("tasks", [])
    objects = [gates, exact, {} if text is None else text]
    if not isinstance(runs, list) or not isinstance(tasks, list):
        return None
    if not all(isinstance(value, dict) for value in (*objects, *runs, *tasks)):
        return None
    limits = {name: gates[name] for name in _GATES if name in gates}
    if not all(map(_is_number, limits.values())) or not all(map(_has_counts, (exact, objects[2], *runs, *tasks))):
        return None
    if not all(map(_has_numbers, (*runs, *tasks))):
        return None
    return {**report, "gates": {name: float(limit) for name, limit in limits.items()}}


def _has_counts(entries: Mapping[str, Any]) -> bool:
    return all(entries[key] is None or is_size(entries[key]) for key in _COUNTS & entries.keys())


def _has_numbers(entries: Mapping[str, Any]) -> bool:
    interval = entries.get("delta_nll_interval", [0.0, 0.0])
    if not isinstance(interval, list) or len(interval) != 2 or not all(map(_is_number, interval)):
        return False
    return all(entries[key] is None or _is_number(entries[key]) for key in _NUMBERS & entries.keys())


def _is_number(value: Any) -> bool:
    return value in _NOT_FINITE or type(value) is float or (type(value) is int and abs(value) < 10**300)
