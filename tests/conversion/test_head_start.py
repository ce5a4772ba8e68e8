"""A guess saves time where it is right and costs nothing but time where it is wrong."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.source import CheckpointSource
from int8convert.conversion.head_start import guess_plan
from int8convert.conversion.pipeline import Pipeline
from int8convert.errors import CoverageError
from int8convert.events import Event
from int8convert.planning.model_map.model_map import ModelMap, ModuleFilter
from int8convert.planning.plan import PlannedShard
from int8convert.planning.reading_order import ReadingOrder
from int8convert.sources import open_source
from tests.conftest import InProcessMap
from tests.tools.tiny_models import file_bytes, save_as_pickles, save_checkpoint


@pytest.fixture
def n_conversions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Makes the map wait until two shards are converted by the guess; counts all shards converted."""
    converted = 0
    two_are_done = threading.Event()
    real = Pipeline.convert

    def convert(self: Pipeline, *arguments: object) -> object:
        nonlocal converted
        writer = real(self, *arguments)  # type: ignore[arg-type]
        converted += 1
        if converted == 2:
            two_are_done.set()
        return writer

    class LateMap(InProcessMap):
        def __init__(self, source: CheckpointSource, modules: ModuleFilter) -> None:
            super().__init__(source, modules)

        def result(self) -> ModelMap:
            assert two_are_done.wait(60)
            return super().result()

    monkeypatch.setattr(Pipeline, "convert", convert)
    monkeypatch.setattr("int8convert.planning.pending_plan.ModelMapProcess", LateMap)
    return lambda: converted


def convert_without_head_start(source: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("int8convert.conversion.job.guess_plan", lambda *arguments: None)
        monkeypatch.setattr("int8convert.planning.pending_plan.ModelMapProcess", InProcessMap)
        int8convert.quantize(source, out, on_event=lambda event: None)


def test_right_guess_is_kept_and_converts_no_shard_twice(
    tmp_path: Path, n_conversions: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    events: list[Event] = []
    n_digests = 0
    digest = PlannedShard.digest

    def counting(self: PlannedShard) -> str:
        nonlocal n_digests
        n_digests += 1
        return digest(self)

    monkeypatch.setattr(PlannedShard, "digest", counting)
    report = int8convert.quantize(source, tmp_path / "out", on_event=events.append)
    assert n_conversions() == report.n_shards == 3
    assert n_digests <= 6 * report.n_shards  # not one a block, which made many tensors cost their square
    convert_without_head_start(source, tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")
    assert type(events[0]).__name__ == "PlanMade"
    assert sum(type(event).__name__ == "TensorQuantized" for event in events) == 12
    assert {kept.reason for kept in report.kept} == {"embedding", "embedding, tied", "not a matrix product"}


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_wrong_guess_changes_no_byte(name: str, tmp_path: Path, n_conversions: Callable[[], int]) -> None:
    """Keys without the base prefix, or modules kept in fp32: names alone cannot know."""
    source = save_checkpoint(name, tmp_path / "plain", max_shard_size="60KB")
    if name == "opt":
        source = save_as_pickles(source, tmp_path / "source", 3, rename=lambda key: key.removeprefix("model."))
    report = int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    assert n_conversions() > report.n_shards
    convert_without_head_start(source, tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_refusal_after_a_head_start_leaves_nothing(tmp_path: Path, n_conversions: Callable[[], int]) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    before = file_bytes(tmp_path)
    with pytest.raises(CoverageError):
        int8convert.quantize(source, tmp_path / "a" / "b" / "out", min_coverage=0.9, on_event=lambda event: None)
    assert n_conversions() >= 2
    assert file_bytes(tmp_path) == before and not (tmp_path / "a").exists()


def test_old_checkpoint_survives_a_refused_overwrite(tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    before = file_bytes(tmp_path)
    with pytest.raises(CoverageError):
        int8convert.quantize(source, tmp_path / "out", overwrite=True, min_coverage=0.9, on_event=lambda event: None)
    assert file_bytes(tmp_path) == before


def test_shard_on_its_way_to_the_disk_gets_there_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB"))
    plan = guess_plan(source, ModuleFilter(), None)
    assert plan is not None
    out = tmp_path / "out"
    manifest = Manifest(out)
    out.mkdir()
    manifest.begin({})
    next_has_failed = threading.Event()
    fsync = os.fsync

    def late_fsync(fd: int) -> None:
        assert next_has_failed.wait(60)
        time.sleep(0.1)  # for whoever would remove the file in the meantime
        fsync(fd)

    def failing(*arguments: object) -> object:
        next_has_failed.set()
        raise OSError(errno.EIO, "Input/output error")

    with Pipeline(manifest, out, 1, lambda event: None) as pipeline:
        first = pipeline.convert(plan.shards[0], lambda event: None, ReadingOrder(plan))
        monkeypatch.setattr(os, "fsync", late_fsync)
        monkeypatch.setattr(pipeline, "convert", failing)
        with pytest.raises(OSError, match="Input/output error"):
            pipeline.run(plan, {}, {0: first})
    assert set(manifest.read_records()) == {plan.shards[0].file_name}
    assert {path.name for path in out.iterdir() if path.is_file()} == {plan.shards[0].file_name}
