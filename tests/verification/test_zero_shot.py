"""Zero-shot tasks in pairs: the test's p values, the pairs, the gate; and the harness itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from int8convert.errors import SourceError
from int8convert.publish.verify_command import Gates
from int8convert.runtime.text.texts import Text
from int8convert.verification.options import Execution, Tasks
from int8convert.verification.tasks import TaskReport, _pair, mcnemar, measure_tasks
from int8convert.verification.verdict import task_failures
from int8convert.verification.verify import verify
from tests.tools.outlier_models import convert, outlier_model, save

pytestmark = [
    pytest.mark.usefixtures("map_in_process"),
    pytest.mark.filterwarnings("ignore"),
]

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.mark.parametrize(
    ("pairs", "p"),
    [
        ((0, 0), 1.0),
        ((5, 5), 1.0),
        ((1, 0), 1.0),
        ((6, 0), 2 / 64),
        ((1, 9), 22 / 1024),
        ((9, 1), 22 / 1024),
        ((5, 15), 0.04138946533203125),  # scipy.stats.binomtest(5, 20).pvalue
    ],
)
def test_p_values_are_those_of_the_binomial_test(pairs: tuple[int, int], p: float) -> None:
    assert mcnemar(*pairs) == pytest.approx(p, rel=1e-12)


def test_thousands_of_pairs_overflow_nothing() -> None:
    """Against the normal approximation, which is good there."""
    z = (2100 - 1900 - 1) / math.sqrt(4000)
    assert mcnemar(1900, 2100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


def result(right: list[int], perplexity: float) -> dict[str, Any]:
    samples = [{"doc_id": i, "acc": float(value), "perplexity": -1.0} for i, value in enumerate(right)]
    return {"samples": {"t": samples[::-1]}, "results": {"t": {"perplexity,none": perplexity}}}


def test_pairs_are_of_the_same_question() -> None:
    found = list(_pair("t", result([1, 1, 1, 1, 0, 0], 3.0), result([1, 1, 0, 0, 0, 1], 4.0)))
    assert found == [
        TaskReport("t", "acc", 6, 4 / 6, 3 / 6, 2, 1, mcnemar(2, 1)),
        TaskReport("t", "perplexity", 6, 3.0, 4.0),
    ]


def test_gate_fails_what_is_worse_and_not_by_chance() -> None:
    worse = TaskReport("piqa", "acc", 100, 0.8, 0.6, 21, 1, mcnemar(21, 1))
    better = TaskReport("piqa", "acc", 100, 0.6, 0.8, 1, 21, mcnemar(1, 21))
    by_chance = TaskReport("piqa", "acc", 100, 0.8, 0.78, 6, 4, mcnemar(6, 4))
    (line,) = task_failures(Gates(), worse)
    assert line.startswith("tasks: piqa acc is 0.6000, expected 0.8000 as of the source; of 100 questions 21 are lost")
    assert not [*task_failures(Gates(), better), *task_failures(Gates(), by_chance)]
    assert not list(task_failures(Gates(min_task_p=1e-9), worse))


@pytest.fixture
def pair(tmp_path: Path, tokenizer: Any) -> tuple[Path, Path]:
    source = save(outlier_model(tokenizer), tmp_path / "source", tokenizer)
    return source, convert(source, tmp_path / "out")


@pytest.fixture
def tasks_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks in the harness's form, of a dozen questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["mat", "dog", "door", "bits"]
    questions = [
        {"q": f"The {a} lay by the", "choices": words, "label": (i + j) % 4}
        for i, a in enumerate(words)
        for j in range(3)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/q.jsonl\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: choice\n{head}output_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    (folder / "last.yaml").write_text(
        f"task: last_word\n{head}output_type: loglikelihood\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{\' \' + choices[label]}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
        "  - metric: acc\n"
    )
    return folder


@needs_harness
def test_both_models_answer_the_same_questions(pair: tuple[Path, Path], tasks_path: Path) -> None:
    found = measure_tasks(*pair, Tasks(path=tasks_path), device="cpu")
    assert [(r.task, r.metric, r.n_samples) for r in found] == [
        ("choice", "acc", 12),
        ("choice", "acc_norm", 12),
        ("last_word", "acc", 12),
        ("last_word", "perplexity", 12),
    ]
    for r in found[:3]:
        assert r.n_only_reference is not None and r.n_only_int8 is not None
        assert (r.int8 - r.reference) * 12 == pytest.approx(r.n_only_int8 - r.n_only_reference)
    assert math.log(found[3].int8) == pytest.approx(math.log(found[3].reference), rel=0.1) and found[3].p_value is None
    same = measure_tasks(pair[0], pair[0], Tasks(("choice",), tasks_path, 5), device="cpu")
    assert [(r.n_samples, r.n_only_reference, r.p_value) for r in same] == [(5, 0, 1.0), (5, 0, 1.0)]


@needs_harness
def test_tasks_are_the_last_level_and_in_the_report(pair: tuple[Path, Path], tasks_path: Path, text: Path) -> None:
    options: dict[str, Any] = {"text": Text(text, n_sequences=2, length=32), "tasks": Tasks(path=tasks_path)}
    report = verify(pair[1], level="tasks", gates=Gates(0.5, 0.5), execution=Execution("cpu"), **options)
    assert report.is_passed and len(report.fidelity) == 1 and len(report.tasks) == 4
    documented = (Path(__file__).parents[2] / "docs" / "verify-json.md").read_text()
    assert all(f"`{name}`" in documented for name in asdict(report.tasks[0]))
    failed = verify(pair[1], level="tasks", gates=Gates(0.5, 0.0), execution=Execution("cpu"), **options)
    assert not failed.is_passed and failed.tasks == ()


@needs_harness
def test_task_that_is_not_there_is_named(pair: tuple[Path, Path], tasks_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no task 'chess'") as raised:
        measure_tasks(*pair, Tasks(("chess",), tasks_path))
    assert "choice, last_word" in raised.value.hint
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="holds no task"):
        measure_tasks(*pair, Tasks(path=tmp_path / "none"))


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_harness_it_is_said_at_once(pair: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError, match="lm_eval is not installed") as raised:
        verify(pair[1], level="tasks")
    assert "int8convert[eval]" in raised.value.hint
