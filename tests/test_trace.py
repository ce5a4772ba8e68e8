"""A timeline holds valid events, nested in each thread, that account for every byte read and written."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import int8convert
from int8convert.errors import OutputError
from int8convert.sources import open_source
from int8convert.trace import recording, span
from tests.tools.tiny_models import save_checkpoint


def read_spans(path: Path) -> list[dict[str, Any]]:
    """Return the "X" events of a trace; check that every other one names the row of a thread."""
    events = json.loads(path.read_text())
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(rows) + len(spans) == len(events)
    assert {event["tid"] for event in spans} == rows.keys() and all(rows.values())
    return spans


def check_nesting(spans: list[dict[str, Any]]) -> None:
    """Check that two spans of a thread are one in the other or apart; times are printed to the nanosecond."""
    rows = defaultdict(list)
    for event in spans:
        assert event["ts"] >= 0 and event["dur"] >= 0 and len({event["pid"] for event in spans}) == 1
        begin = round(event["ts"] * 1000)
        rows[event["tid"]].append((begin, begin + round(event["dur"] * 1000)))
    for row in rows.values():
        open_ends: list[int] = []
        for begin, end in sorted(row, key=lambda times: (times[0], -times[1])):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def n_bytes(spans: list[dict[str, Any]], name: str) -> int:
    return sum(event["args"]["bytes"] for event in spans if event["name"] == name)


@pytest.mark.usefixtures("map_in_process")
def test_spans_nest_and_cover_all_bytes_that_are_read_hashed_and_written(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    with recording(tmp_path / "quantize.json"):
        int8convert.quantize(source, tmp_path / "out", workers=3, on_event=lambda event: None)
    with recording(tmp_path / "export.json"):
        int8convert.export(tmp_path / "out", tmp_path / "new", max_shard_size="50KB", on_event=lambda event: None)
    for trace, read_from, written_to in (("quantize", source, "out"), ("export", tmp_path / "out", "new")):
        spans = read_spans(tmp_path / f"{trace}.json")
        check_nesting(spans)
        opened = open_source(read_from)
        n_copied = sum(path.stat().st_size for path in opened.auxiliary_files)
        n_written = sum(path.stat().st_size for path in (tmp_path / written_to).glob("*.safetensors"))
        assert n_bytes(spans, "write") == n_written
        assert n_bytes(spans, "read") >= sum(tensor.n_bytes for tensor in opened.tensors)
        assert n_bytes(spans, "hash") == n_written + n_copied
        assert {"plan", "convert", "sync"} <= {event["name"] for event in spans}
    assert "quantize" not in {event["name"] for event in spans}, "an export quantizes nothing"


def test_trace_is_written_after_an_error_and_holds_no_later_spans(tmp_path: Path) -> None:
    with pytest.raises(KeyError), recording(tmp_path / "t.json"), span("read", 5):
        raise KeyError
    with span("write", 7):
        pass
    (event,) = read_spans(tmp_path / "t.json")
    assert event["name"] == "read" and event["args"] == {"bytes": 5}


def test_trace_that_cannot_be_written_is_an_error_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file"), recording(tmp_path / "no" / "t.json"):
        pytest.fail("the work began")


def test_nothing_is_recorded_without_a_file() -> None:
    with recording(None):
        assert span("read", 1) is span("write")
