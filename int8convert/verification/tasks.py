"""Zero-shot tasks for both models on the same questions, by EleutherAI's lm-evaluation-harness.

    winogrande acc; hellaswag, piqa acc and acc_norm; lambada_openai acc and perplexity

Each model answers one question at a time, so that no question's outlier columns depend on another's. Questions that
only one of the two models answers right are compared by McNemar's test in its exact form, a two-sided binomial test.

The tasks come from the Hugging Face Hub or its cache or, without a network, from a folder of YAML and JSON files. They
are in the harness's form, and the harness runs any code in them. Costs one model in memory at a time, and some ten
thousand runs of each.

Source: Sec. 3.3 of LLM.int8(), arXiv:2208.07339, for the tasks; McNemar, Psychometrika 12 (1947), for the test.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

from int8convert.checkpoint.library_errors import TRUST_CODE, library_errors
from int8convert.errors import SourceError
from int8convert.verification.options import Tasks

DEFAULT_TASKS = ("winogrande", "hellaswag", "piqa", "lambada_openai")
_PAIRED = ("acc", "acc_norm", "exact_match")
_AGGREGATED = ("perplexity",)


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One metric of one task.

    Attributes:
        n_samples: number of questions.
        reference, int8: share of right answers, 0 to 1; or the perplexity.
        n_only_reference, n_only_int8: questions that only one of the models answers right; None for a perplexity.
        p_value: two-sided p-value of McNemar's exact test; None for a perplexity.
    """

    task: str
    metric: str
    n_samples: int
    reference: float
    int8: float
    n_only_reference: int | None = None
    n_only_int8: int | None = None
    p_value: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the int8 model answers fewer questions right."""
        return self.p_value is not None and self.int8 < self.reference


def mcnemar(n_only_one: int, n_only_other: int) -> float:
    """Return the exact two-sided p-value: the probability that coin tosses split the pairs at least as unevenly."""
    n = n_only_one + n_only_other
    # In integers: with thousands of pairs neither term of the quotient fits a float.
    tail = sum(comb(n, k) for k in range(min(n_only_one, n_only_other) + 1))
    return min(1.0, 2 * tail / (1 << n))


def measure_tasks(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tasks: Tasks = Tasks(),  # noqa: B008, frozen
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[TaskReport, ...]:
    """Let an int8 checkpoint and its source answer the same questions.

    Args:
        tasks: which tasks, and how many questions of each.

    Raises:
        SourceError: the harness is not installed, a task cannot be fetched, or a checkpoint cannot be loaded.
    """
    harness = load_harness()
    manager = harness.tasks.TaskManager(
        include_path=os.fspath(tasks.path) if tasks.path is not None else None, include_defaults=tasks.path is None
    )
    names = list(tasks.names) or (list(DEFAULT_TASKS) if tasks.path is None else sorted(manager.all_tasks))
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown or not names:
        raise SourceError(
            f"there is no task {unknown[0]!r}" if unknown else f"'{tasks.path}' holds no task",
            f"name an existing task: {', '.join(sorted(manager.all_tasks)[:8]) or 'there is none'}",
        )
    found = []
    for path in (reference, out):
        found.append(_answer(harness, manager, path, names, tasks.limit, device, trust_remote_code))
        gc.collect()  # one model in memory at a time
    return tuple(report for name in sorted(found[0]["samples"]) for report in _pair(name, *found))


def load_harness() -> Any:
    """Import the harness.

    Raises:
        SourceError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise SourceError(
            f"zero-shot tasks need the lm-evaluation-harness, and {error.name or 'a part of it'} is not installed",
            "pip install 'int8convert[eval]', or use --level fidelity",
        ) from error
    return lm_eval


def _answer(
    harness: Any,
    manager: Any,
    path: str | os.PathLike[str],
    names: list[str],
    limit: int | None,
    device: str,
    trusts_code: bool,
) -> dict[str, Any]:
    from int8convert.runtime.models import choose_device, load_model
    from int8convert.runtime.pretrained import asking_nobody, read_tokenizer

    model = load_model(path, choose_device(device), trust_remote_code=trusts_code)
    # In this process: the harness wants the object itself.
    tokenizer = read_tokenizer(os.fspath(path), TRUST_CODE, trusts_code)
    runner = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    what = f"the tasks cannot be run on '{os.fspath(path)}'"
    hint = "fetch their data once where there is a network, or name tasks of your own with --tasks-path DIR"
    with library_errors(what, hint, TRUST_CODE), asking_nobody():
        result: dict[str, Any] = harness.simple_evaluate(
            runner, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
        )
    return result


def _pair(name: str, reference: Mapping[str, Any], int8: Mapping[str, Any]) -> Iterator[TaskReport]:
    """Yield a report for each metric of one task."""
    one, other = ({s["doc_id"]: s for s in result["samples"][name]} for result in (reference, int8))
    assert one.keys() == other.keys(), "both models were asked the same questions"
    first: Mapping[str, Any] = next(iter(one.values()), {})
    for metric in _PAIRED:
        if metric in first:
            right = [(bool(one[i][metric]), bool(other[i][metric])) for i in one]
            only_reference = sum(a and not b for a, b in right)
            only_int8 = sum(b and not a for a, b in right)
            n = len(right)
            shares = sum(a for a, _ in right) / n, sum(b for _, b in right) / n
            p_value = mcnemar(only_reference, only_int8)
            yield TaskReport(name, metric, n, *shares, only_reference, only_int8, p_value)
    for metric in _AGGREGATED:
        if metric in first:
            before, after = (float(result["results"][name][f"{metric},none"]) for result in (reference, int8))
            yield TaskReport(name, metric, len(one), before, after)
