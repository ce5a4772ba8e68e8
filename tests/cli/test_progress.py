"""The renderer shows events of all commands: lines where nobody watches, notes if quiet, nothing for --json."""

from __future__ import annotations

import pytest

from int8convert.cli.progress import _Counter, _LiveBar, showing_progress
from int8convert.events import (
    DownloadStarted,
    Event,
    FileSent,
    HubReadStarted,
    MeasurementStarted,
    MeasurementStep,
    PlanMade,
    ShardFinished,
    ShardRepeated,
    ShardSkipped,
    TensorKept,
    TensorQuantized,
    TensorsCompared,
)

PLAN = PlanMade("source", None, "OPTForCausalLM", 2, 2_000_000, 2, 1_000_000, 0.75, ("a note",))
CASES: list[tuple[Event, str]] = [
    (PLAN, "note: a note\nOPTForCausalLM: 2 MB in 2 shards -> 1 MB in 2, 75.0 % of the parameters to int8\n"),
    (
        ShardSkipped(0, 2, "model-00001-of-00002.safetensors", 9),
        "shard 1 of 2: model-00001-of-00002.safetensors is done from an earlier run\n",
    ),
    (
        ShardFinished(1, 2, "model-00002-of-00002.safetensors", 3000),
        "shard 2 of 2: model-00002-of-00002.safetensors 3 kB written\n",
    ),
    (
        ShardRepeated(0, 2, "a", "b came with wrong bytes"),
        "note: shard 1 of 2, a, is made again: b came with wrong bytes\n",
    ),
    (FileSent("config.json", 700, True, 700), "config.json: 700 B sent\n"),
    (FileSent("config.json", 700, True, 700, 2000), "config.json: 700 B sent; 700 B of 2 kB are there\n"),
    (FileSent("config.json", 700, False, 700, 2000), ""),
    (
        HubReadStarted("me/x", "0123456789abcdef", 0, False),
        "note: reading me/x at 0123456789ab from the cache of the Hub's client\n",
    ),
    (
        HubReadStarted("me/x", "0123456789abcdef", 5, False),
        "note: reading me/x at 0123456789ab from the Hub: 5 B, of which nothing is kept\n",
    ),
    (DownloadStarted("model.safetensors", 5), "note: fetching model.safetensors, 5 B\n"),
    (TensorsCompared(1, 2), ""),
    (MeasurementStarted(False, 5_000_000, 20), "note: running in memory, at most 5 MB\n"),
    (MeasurementStep("window", 1, 20, 190.0), "measured: 1 of 20 steps, about 3 minutes left\n"),
    (MeasurementStep("window", 2, 20, 0.4), "measured: 2 of 20 steps, less than a second left\n"),
    (MeasurementStep("window", 20, 20, 0.0), "measured: 20 of 20 steps\n"),
    (MeasurementStep("window", 1, 1, 0.0), "measured: 1 of 1 steps\n"),
]


@pytest.mark.parametrize(("event", "line"), CASES)
def test_event_is_one_line_where_nobody_watches(event: Event, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(quiet=False, as_json=False) as sink:
        sink(event)
    assert capsys.readouterr() == ("", line)


def test_quiet_prints_the_notes_of_the_plan_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(quiet=True, as_json=False) as sink:
        for event, _ in CASES:
            sink(event)
    notes = "note: a note\nnote: shard 1 of 2, a, is made again: b came with wrong bytes\n"
    assert capsys.readouterr() == ("", notes)


def test_json_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(quiet=False, as_json=True) as sink:
        for event, _ in CASES:
            sink(event)
    assert capsys.readouterr() == ("", "")


def test_rate_counts_what_this_run_read_and_no_tensor_twice(capsys: pytest.CaptureFixture[str]) -> None:
    done = TensorKept("a", "a", 1, 10**9, 10**9, "F16", "", is_replayed=True)
    new = TensorQuantized("b", "b", 1, 1000, 500, 40.0, 1.0, 2.0)
    with showing_progress(quiet=False, as_json=False) as sink:
        for event in (PLAN, done, new, new, done):
            sink(event)
        assert (sink._counter.read_bytes, sink._counter.passed_bytes) == (1000, 10**9 + 1000)  # type: ignore[attr-defined]


def test_estimate_comes_after_the_first_step_and_with_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(quiet=False, as_json=False) as sink:
        for n in range(1, 41):
            sink(MeasurementStep("window", n, 40, 30.0 * (40 - n)))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "measured: 1 of 40 steps, about 20 minutes left",
        "measured: 4 of 40 steps, about 18 minutes left",
        "measured: 8 of 40 steps, about 16 minutes left",
    ]
    assert lines[-2:] == ["measured: 36 of 40 steps, about 2 minutes left", "measured: 40 of 40 steps"]
    assert len(lines) == 11


def test_bar_says_the_estimate_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = _LiveBar("")
    monkeypatch.setattr(bar._progress, "start", lambda: None)  # nothing is drawn
    for event, detail in (
        (MeasurementStarted(True, 5, 3), ""),
        (MeasurementStep("layers.0", 1, 3, 7300.0), "layers.0, about 2 hours left"),
        (MeasurementStep("layers.1", 2, 3, 3600.0), "layers.1"),
    ):
        bar.show(event, _Counter())
        assert bar._progress.tasks[0].fields["detail"] == detail
