"""What a refusal leaves as it was, and what becomes of a finished shard when the next one fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

import int8convert
from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.shard_access import LocalShards
from int8convert.conversion.destination import LocalDestination
from int8convert.conversion.pipeline import Pipeline
from int8convert.errors import CoverageError
from int8convert.events import Event, ShardStarted
from tests.tools.tiny_models import file_bytes, save_checkpoint

pytestmark = pytest.mark.usefixtures("map_in_process")


def test_refused_plan_leaves_nothing(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    before = file_bytes(tmp_path)
    with pytest.raises(CoverageError):
        int8convert.quantize(
            source, tmp_path / "a" / "b" / "out", int8convert.PlanOptions(min_coverage=0.9), on_event=lambda event: None
        )
    assert file_bytes(tmp_path) == before and not (tmp_path / "a").exists()


def test_old_checkpoint_survives_a_refused_overwrite(tmp_path: Path) -> None:
    source = save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB")
    int8convert.quantize(source, tmp_path / "out", on_event=lambda event: None)
    before = file_bytes(tmp_path)
    with pytest.raises(CoverageError):
        int8convert.quantize(
            source,
            tmp_path / "out",
            int8convert.PlanOptions(min_coverage=0.9),
            overwrite=True,
            on_event=lambda event: None,
        )
    assert file_bytes(tmp_path) == before


def test_shard_on_its_way_to_the_disk_gets_there_when_the_next_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = int8convert.plan(save_checkpoint("opt", tmp_path / "source", max_shard_size="60KB"))
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

    def fail_at_the_second(event: Event) -> None:
        if isinstance(event, ShardStarted) and event.i == 1:
            next_has_failed.set()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", late_fsync)
    with pytest.raises(OSError, match="Input/output error"), Pipeline(manifest, out, 1, fail_at_the_second) as pipeline:
        pipeline.run(plan, {}, lambda order, distrusted: LocalShards(), LocalDestination().deliver)
    assert set(manifest.read_records()) == {plan.shards[0].file_name}
    assert {path.name for path in out.iterdir() if path.is_file()} == {plan.shards[0].file_name}
