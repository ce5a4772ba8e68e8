"""Conversions that measure first, `--smooth` and `--quality best`: killed or read from the Hub, the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import int8convert
from int8convert import PlanOptions, Text
from int8convert.events import Event, ignore
from int8convert.outliers.quality import best_options
from tests.tools.calibrations import letters, save_calibration
from tests.tools.hub_repositories import NAME, add
from tests.tools.hub_server.fixtures import Connect, connect, hub
from tests.tools.hub_server.hub import Hub
from tests.tools.language_models import build_tokenizer
from tests.tools.outlier_models import outlier_model
from tests.tools.tiny_models import file_bytes

__all__ = ["connect", "hub"]

pytestmark = [
    pytest.mark.usefixtures("rotation_in_process"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Convert = Callable[[str | Path, Path, Callable[[Event], None]], None]
"""Convert a source to a directory, and report the events."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An OPT with outliers, in several shards."""
    tokenizer = build_tokenizer()
    outlier_model(tokenizer).half().save_pretrained(tmp_path / "source", max_shard_size="80KB")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(params=["smooth", "best"])
def convert(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Convert:
    if request.param == "smooth":
        folder = save_calibration(source, tmp_path / "cal")

        def smooth(src: str | Path, out: Path, on_event: Callable[[Event], None]) -> None:
            options = PlanOptions(calibration=folder, smooth="calibrated", format="compressed-tensors")
            int8convert.quantize(src, out, options, on_event=on_event)

        return smooth
    path = tmp_path / "text.txt"
    path.write_text(letters(8000, seed=0))
    text = Text(path, n_sequences=4, length=32)

    def best(src: str | Path, out: Path, on_event: Callable[[Event], None]) -> None:
        asked = PlanOptions(format="compressed-tensors")
        found = best_options(src, out, asked, text, percent=20, device="cpu", on_event=on_event)
        int8convert.quantize(src, out, found.options, on_event=on_event)

    return best


def convert_in_child(convert: Convert, source: Path, out: Path, kill_at: int | None = None) -> list[str]:
    """Convert in a process of its own, which a SIGKILL ends at an event; the names of the events before."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        torch.set_num_threads(1)  # the threads of the parent are not here
        n_events = 0

        def on_event(event: Event) -> None:
            nonlocal n_events
            if n_events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            n_events += 1
            os.write(write_end, f"{type(event).__name__}\n".encode())

        try:
            convert(source, out, on_event)
        finally:
            os._exit(0 if (out / "config.json").exists() else 1)
    os.close(write_end)
    with open(read_end) as pipe:
        events = pipe.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if kill_at is None else -signal.SIGKILL)
    return events


@pytest.mark.parametrize(
    "every", [pytest.param(False, id="few"), pytest.param(True, id="every event", marks=pytest.mark.slow)]
)
def test_killed_at_an_event_the_rerun_gives_the_same_bytes(
    every: bool, convert: Convert, source: Path, tmp_path: Path
) -> None:
    out, calibration = tmp_path / "out", tmp_path / "out-calibration"
    events = convert_in_child(convert, source, out)
    expected = file_bytes(out)
    shutil.rmtree(out)
    last_step = len(events) - 1 - events[::-1].index("MeasurementStep")
    few = [events.index("MeasurementStep"), last_step, events.index("ShardFinished") + 1, len(events) - 2]
    for place in range(len(events)) if every else few:
        shutil.rmtree(calibration, ignore_errors=True)
        convert_in_child(convert, source, out, place)
        convert_in_child(convert, source, out)
        assert file_bytes(out) == expected, f"killed at {events[place]}, event {place}"
        shutil.rmtree(out)


def test_bytes_from_the_hub_are_those_from_disk(
    convert: Convert, source: Path, hub: Hub, connect: Connect, tmp_path: Path
) -> None:
    add(hub, source)
    connect(hub, hub.token)
    convert(source, tmp_path / "disk", ignore)
    convert(NAME, tmp_path / "hub-out", ignore)
    expected, found = file_bytes(tmp_path / "disk"), file_bytes(tmp_path / "hub-out")
    names = [name for name in expected if name.endswith(".safetensors") or name in ("config.json", "tokenizer.json")]
    assert len(names) > 3
    for name in names:
        assert found[name] == expected[name], name
