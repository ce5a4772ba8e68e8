"""The bar that library users see is full when a conversion is through, and gone when it failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.auto
from safetensors.torch import save_file

import int8convert
from int8convert.events import Event, FileSent, MeasurementStarted, MeasurementStep, TensorsCompared
from int8convert.progress_bar import sink_or_bar
from tests.tools.tiny_models import read_tensors, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that were made; a closed one is `disable`d."""
    made: list[Any] = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    return made


def test_bar_counts_all_that_is_read_once(bars: list[Any], tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="40KB")
    for _ in ("made", "done already"):
        report = int8convert.quantize(source, tmp_path / "out")
        bar = bars.pop()
        assert bar.n == bar.total == report.n_read_bytes > 0
        assert bar.disable


def test_bar_begins_anew_with_the_conversion(bars: list[Any], tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    tensors = read_tensors(source)
    tensors["model.decoder.layers.1.fc2.weight"][3, 5] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = int8convert.quantize(
        source, tmp_path / "out", int8convert.PlanOptions(min_coverage=0), on_nonfinite="keep"
    )
    (bar,) = bars
    assert bar.n == bar.total == report.n_read_bytes


def test_bar_is_closed_by_an_error(bars: list[Any], tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source")
    with pytest.raises(int8convert.Int8ConvertError, match="parameters would become int8"):
        int8convert.quantize(source, tmp_path / "out", int8convert.PlanOptions(min_coverage=1.0))
    (bar,) = bars
    assert bar.disable


def test_bar_follows_the_events_of_other_commands(bars: list[Any]) -> None:
    with sink_or_bar(None, "verify") as sink:
        (bar,) = bars
        for event, n, total in (
            (TensorsCompared(30, 100), 30, 100),
            (TensorsCompared(100, 100), 100, 100),
            (MeasurementStarted(True, 5000, 3), 0, 3),
            (MeasurementStep("model.layers.0", 1, 3, 60.0), 1, 3),
            (FileSent("config.json", 5, True, 5, 20), 5, 20),
            (FileSent("shard", 15, False, 20, 20), 20, 20),
        ):
            sink(event)
            assert (bar.n, bar.total) == (n, total)
    assert bar.disable and bar.desc == "verify"


def test_own_sink_gets_the_events_and_no_bar(bars: list[Any]) -> None:
    seen: list[Event] = []
    with sink_or_bar(seen.append, "upload") as sink:
        sink(TensorsCompared(1, 2))
    assert seen == [TensorsCompared(1, 2)] and not bars
