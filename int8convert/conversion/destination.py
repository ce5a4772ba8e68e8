"""Converting a model that fits on no disk here: each shard goes elsewhere once it is finished, and is removed.

What "elsewhere" is, the conversion does not know: `int8convert.publish.shard_publisher` is the Hub. What it knows is
how much of the output lies on the disk at a time: a shard that is being converted, those that wait for the bytes they
were made of to be checked, and one on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from int8convert.checkpoint.manifest import ShardRecord
from int8convert.checkpoint.names import quoted
from int8convert.errors import DiskFullError
from int8convert.planning.plan import ConversionPlan

_SMALL_BYTES = 20_000_000
"""Manifest, index and records, beside the small files that are carried over: 4 MB for 100,000 tensors."""


class ShardPublisher(Protocol):
    """Where finished shards go.

    url: for people to look at.
    commit: what identifies the whole there, once it is complete.
    keeps_card: somebody's own description of it is there, and was left as it is.
    """

    @property
    def url(self) -> str: ...

    @property
    def commit(self) -> str | None: ...

    @property
    def keeps_card(self) -> bool: ...

    def begin(self, request: Mapping[str, Any], overwrite: bool) -> dict[str, ShardRecord]:
        """Begin a conversion there, or go on with one; the records of the shards it has, by file name. Only looks.

        Raises:
            OutputError: something else is there, and is not to be overwritten.
            HubError: it cannot be reached.
        """

    def make(self) -> None:
        """The first change there, once all is checked.

        Raises:
            HubError: it cannot be written to.
        """

    def publish(self, record: ShardRecord, path: Path) -> None:
        """Put a finished shard and its record there; when this returns, the file may go.

        Raises:
            HubError: it does not arrive.
        """

    def complete(self, out: Path) -> None:
        """Put the small files there that make it a checkpoint, and see that all of it arrived.

        Raises:
            HubError: they do not arrive, or a shard has other bytes than it had here.
        """


@dataclass(frozen=True, slots=True)
class Publishing:
    """A conversion whose shards go elsewhere.

    Attributes:
        publisher: where to.
        keeps: they stay here, too.
        max_disk_bytes: of what lies here at a time; None is what the disk has.
    """

    publisher: ShardPublisher
    keeps: bool = False
    max_disk_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """How a conversion keeps within its disk.

    n_bytes: of the output, at most at a time.
    one_at_a_time: a shard is begun only when the one before it is gone.
    """

    n_bytes: int
    one_at_a_time: bool


def plan_disk(
    plan: ConversionPlan, done: Collection[str], is_checked: bool, free_bytes: int, publishing: Publishing
) -> DiskBudget:
    """The fastest way that keeps within the disk.

    Args:
        done: names of output shards that are finished.
        is_checked: shards wait for their source's bytes to be checked.
        free_bytes: on the disk.

    Raises:
        DiskFullError: there is none.
    """
    small = sum(path.stat().st_size for path in plan.source.carried) + _SMALL_BYTES
    limit = min(free_bytes, publishing.max_disk_bytes or free_bytes)
    budgets = [
        DiskBudget(small + _peak_bytes(plan, done, is_checked, 0 if one_at_a_time else 1), one_at_a_time)
        for one_at_a_time in (False, True)
    ]
    for budget in budgets:
        if budget.n_bytes <= limit:
            return budget
    asked = publishing.max_disk_bytes is not None and limit == publishing.max_disk_bytes
    raise DiskFullError(
        f"shards of {quoted(plan.source.label)} take {budgets[-1].n_bytes:,} bytes of disk at a time, "
        f"{'--max-disk allows' if asked else 'free are'} {limit:,}",
        "--max-shard-size makes smaller ones, as far as the source's own shards are small",
    )


def _peak_bytes(plan: ConversionPlan, done: Collection[str], is_checked: bool, n_behind: int) -> int:
    """Most bytes of shards that are neither gone nor not yet begun, at any time.

    Args:
        n_behind: how many shards may be on their way while the next is converted.
    """
    left = [shard for shard in plan.shards if shard.file_name not in done]
    sources = [{source.path.name for tensor in shard.tensors for source in tensor.shards} for shard in left]
    last_need = {name: i for i, names in enumerate(sources) for name in names}
    # A file that is needed for its scales alone is read behind all others.
    read = {tensor.shard.path.name for shard in left for tensor in shard.tensors}
    last_need |= dict.fromkeys(last_need.keys() - read, len(left) - 1)
    gone_after = [
        max((last_need[name] for name in names), default=i) if is_checked else i for i, names in enumerate(sources)
    ]
    # While shard i is converted, all that was handed over `n_behind` shards ago is through.
    return max(
        (
            sum(shard.n_bytes for shard, gone in zip(left[: i + 1], gone_after, strict=False) if gone >= i - n_behind)
            for i in range(len(left))
        ),
        default=0,
    )
