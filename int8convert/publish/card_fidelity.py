"""The section on how far a converted model's predictions are from its source's: what verify.json says of it."""

from __future__ import annotations

import math
from typing import Any

from int8convert.publish.card_source import source_repository
from int8convert.publish.card_text import code, percent, plain, table
from int8convert.publish.finished import NEVER_VERIFIED, FinishedOutput

_DIGITS = 6
_MAX_OVERRULED = 4
_RUN_HEADS = (
    *("arithmetic", "perplexity, source", "perplexity, int8", "change of NLL", "interval", "mean KL"),
    "same top token",
)


def fidelity(output: FinishedOutput, repository: str) -> str:
    """The section; of what was not verified, that it was not, and why."""
    if output.verify is None:
        why = "how far it is from its source was not measured"
        why = why if output.unverified == NEVER_VERIFIED else plain(output.unverified)
        named = "" if source_repository(output) else " --reference SOURCE"
        return (
            f"## Fidelity\n\n**Not verified**: {why}. {code(f'int8convert verify {repository}{named}')} compares it "
            "with its source, tensor by tensor and by its predictions."
        )
    exact = output.verify.get("exact") or {}
    n_weights, n_different = (int(exact.get(key) or 0) for key in ("n_int8_weights", "n_different_codes"))
    runs = [run for run in output.verify.get("fidelity") or [] if isinstance(run, dict)]
    said = (
        f"{_verdict(output.verify, bool(runs))} By {plain(str(output.verify.get('tool')))}. Code by code, "
        f"{n_weights:,} int8 matrices were compared with the source: {n_different:,} codes differ from the reference "
        "rounding."
    )
    said += _overruled(output.verify)
    if not runs:
        return f"## Fidelity\n\n{said} The model was not run."
    text = output.verify.get("text") or {}
    read = (
        f"Source and int8 model read the same text, {plain(str(text.get('description') or text.get('name')))} (sha256 "
        f"{code(str(text.get('sha256'))[:16])}); {plain(str(text.get('convention')))}. Intervals are of 95 %."
    )
    rows = [_run_row(run) for run in runs]
    return "\n\n".join(["## Fidelity", said, read, table(_RUN_HEADS, rows), _tasks(output.verify)]).rstrip()


def _verdict(verify: dict[str, Any], has_run: bool) -> str:
    """What it took to pass."""
    gates = verify.get("gates") or {}
    limits = [
        (has_run, "upper end of the interval of the change of NLL at most", gates.get("max_dnll")),
        (has_run, "mean KL divergence at most", gates.get("max_kl")),
        (bool(verify.get("tasks")), "no task done worse with p below", gates.get("min_task_p")),
    ]
    shown = [f"{what} {limit:g}" for applies, what, limit in limits if applies and isinstance(limit, int | float)]
    return f"**Passed**: {', '.join(shown)}." if shown else "**Passed.**"


def _overruled(verify: dict[str, Any]) -> str:
    """Measurements that broke stricter gates than those that were passed since."""
    told = verify.get("earlier_failures")
    found = [entry for entry in told if isinstance(entry, dict)] if isinstance(told, list) else []
    lines = [
        plain(line, max_length=300)
        for entry in found
        if entry.get("status") == "overruled" and isinstance(entry.get("failures"), list)
        for line in entry["failures"][:_MAX_OVERRULED]
        if isinstance(line, str)
    ]
    return f" **An earlier run on the same files failed stricter gates**: {'; '.join(lines)}." if lines else ""


def _run_row(run: dict[str, Any]) -> list[str]:
    low, high = (run.get("delta_nll_interval") or [0.0, 0.0])[:2]
    return [
        str(run.get("mode")),
        *_alike(run.get("reference_perplexity"), run.get("perplexity")),
        _number(run.get("delta_nll"), "+.5f"),
        f"{_number(low, '+.5f')} to {_number(high, '+.5f')}",
        _number(run.get("mean_kl"), ".6f"),
        percent(float(run["same_top1"])) if isinstance(run.get("same_top1"), int | float) else "",
    ]


def _alike(*values: Any) -> list[str]:
    """Numbers to be compared: as many decimals for each as give the largest its digits."""
    finite = [abs(value) for value in values if isinstance(value, int | float) and value and math.isfinite(value)]
    largest = max(finite, default=1.0)
    return [_number(value, f".{max(0, _DIGITS - 1 - math.floor(math.log10(largest)))}f") for value in values]


def _number(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else str(value or "")


def _tasks(verify: dict[str, Any]) -> str:
    rows = [
        [
            str(task.get("task")),
            str(task.get("metric")),
            f"{int(task.get('n_samples') or 0):,}",
            *(_number(task.get(key), ".4f") for key in ("reference", "int8", "p_value")),
        ]
        for task in verify.get("tasks") or []
        if isinstance(task, dict)
    ]
    if not rows:
        return ""
    return "Zero-shot tasks, both models on the same questions; p by McNemar's exact test:\n\n" + table(
        ["task", "metric", "questions", "source", "int8", "p"], rows
    )
