"""How a conversion whose shards go elsewhere keeps within its disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from int8convert.conversion.disk_budget import shards_on_their_way
from int8convert.errors import DiskFullError

SMALL = 20_000_000


def plan_of(carried: Path, *shards: tuple[int, str], scales_in: str | None = None) -> Any:
    """Shards of so many bytes, each of one source shard; the first one with scales in another."""
    planned = []
    for i, (n_bytes, name) in enumerate(shards):
        source = SimpleNamespace(path=Path(name), remote="a file on the Hub")
        scales = (SimpleNamespace(path=Path(scales_in)),) if scales_in and i == 0 else ()
        tensor = SimpleNamespace(shard=source, shards=(source, *scales))
        planned.append(SimpleNamespace(file_name=f"{i}", n_bytes=n_bytes, tensors=[tensor]))
    shards = [shard.tensors[0].shard for shard in planned]
    return SimpleNamespace(
        shards=planned, source=SimpleNamespace(auxiliary_files=(carried,), label="org/name", shards=shards)
    )


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(b"t" * 7)
    return tmp_path / "tokenizer.json"


def budget(plan: Any, free: int, done: tuple[str, ...] = (), most: int | None = None) -> tuple[int, bool]:
    """The bytes needed, and whether shards are made one at a time."""
    found = shards_on_their_way(plan, done, free, most)
    assert found.n_spare_bytes == min(free, most or free) - found.n_bytes
    return found.n_bytes, found.one_at_a_time


def test_one_shard_is_converted_while_another_is_sent_if_there_is_room_for_both(carried: Path) -> None:
    plan = plan_of(carried, (10, "a"), (20, "b"), (30, "c"), (5, "d"))
    both, one = SMALL + 7 + 50, SMALL + 7 + 30
    assert budget(plan, both) == (both, False)
    assert budget(plan, both - 1) == budget(plan, one) == (one, True)
    assert budget(plan, both + 999, most=one) == budget(plan, one, most=both) == (one, True)
    with pytest.raises(
        DiskFullError, match=f"'org/name' take {one:,} bytes of disk at a time, its free bytes are {one - 1:,}"
    ):
        budget(plan, one - 1, most=both)
    with pytest.raises(DiskFullError, match=f"at a time, --max-disk allows {one - 1:,}"):
        budget(plan, both, most=one - 1)


def test_shards_that_are_finished_need_no_room(carried: Path) -> None:
    plan = plan_of(carried, (10, "a"), (20, "b"), (30, "c"), (5, "d"))
    assert budget(plan, 1 << 40, ("1", "2")) == (SMALL + 7 + 15, False)
    assert budget(plan, 1 << 40, ("0", "1", "2", "3")) == (SMALL + 7, False)


def test_shards_of_one_source_shard_wait_for_one_another_if_that_is_checked(carried: Path) -> None:
    plan = plan_of(carried, (10, "a"), (20, "a"), (30, "a"), (5, "b"))
    assert budget(plan, 1 << 40) == (SMALL + 7 + 65, False)
    assert budget(plan, SMALL + 7 + 64) == (SMALL + 7 + 60, True)
    for shard in plan.source.shards:
        shard.remote = None
    assert budget(plan, 1 << 40) == (SMALL + 7 + 50, False)


@pytest.mark.parametrize(
    ("scales_in", "both", "one"),
    [("b", 10 + 20 + 30, 10 + 20), ("c", 10 + 20 + 30, 10 + 30), ("scales alone", 10 + 20 + 30, 10 + 30)],
)
def test_shard_waits_for_the_one_its_scales_are_in(carried: Path, scales_in: str, both: int, one: int) -> None:
    """What holds nothing but scales is read behind all others."""
    plan = plan_of(carried, (10, "a"), (20, "b"), (30, "c"), (5, "d"), scales_in=scales_in)
    assert budget(plan, 1 << 40) == (SMALL + 7 + both, False)
    assert budget(plan, SMALL + 7 + both - 1) == (SMALL + 7 + one, True)
