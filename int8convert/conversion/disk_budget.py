"""How much of the output is on the disk at a time: all of it, or the shards on their way to another place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from int8convert.conversion.readers import is_remote
from int8convert.errors import DiskFullError
from int8convert.planning.export_plan import ShardedPlan
from int8convert.text import quoted

_SMALL_BYTES = 20_000_000
"""Bytes of manifest, index and records, beside the auxiliary files: 4 MB for 100,000 tensors."""


@dataclass(frozen=True, slots=True)
class DiskBudget:
    """How a conversion keeps within the disk of OUT.

    Attributes:
        n_bytes: the most bytes of the output that are on the disk at a time.
        n_spare_bytes: bytes that may be used beside them; negative if the output does not fit.
        one_at_a_time: a shard is begun only after the one before it is delivered.
    """

    n_bytes: int
    n_spare_bytes: int
    one_at_a_time: bool = False


def whole_output(plan: ShardedPlan, n_free_bytes: int) -> DiskBudget:
    """Return the budget of an output that stays in OUT as a whole.

    Args:
        n_free_bytes: on the disk of OUT, without the weight files that are in OUT.
    """
    n_bytes = plan.n_written_bytes + _auxiliary_bytes(plan)
    return DiskBudget(n_bytes, n_free_bytes - n_bytes)


def shards_on_their_way(
    plan: ShardedPlan, done: Collection[str], n_free_bytes: int, max_disk_bytes: int | None
) -> DiskBudget:
    """Return the budget of an output whose shards are removed once they are sent: the fastest that fits.

    Args:
        n_free_bytes: on the disk of OUT, without the weight files that are in OUT.
        max_disk_bytes: of these, bytes that may be used; None allows all.

    Raises:
        DiskFullError: not even one shard at a time fits.
    """
    small = _auxiliary_bytes(plan) + _SMALL_BYTES
    limit = min(n_free_bytes, max_disk_bytes or n_free_bytes)
    needed = small
    for one_at_a_time in (False, True):
        needed = small + _peak_bytes(plan, done, 0 if one_at_a_time else 1)
        if needed <= limit:
            return DiskBudget(needed, limit - needed, one_at_a_time)
    is_asked = max_disk_bytes is not None and limit == max_disk_bytes
    raise DiskFullError(
        f"shards of {quoted(plan.source.label)} take {needed:,} bytes of disk at a time, "
        f"{'--max-disk allows' if is_asked else 'its free bytes are'} {limit:,}",
        "pass a smaller --max-shard-size, or free disk space",
    )


def _auxiliary_bytes(plan: ShardedPlan) -> int:
    return sum(path.stat().st_size for path in plan.source.auxiliary_files)


def _peak_bytes(plan: ShardedPlan, done: Collection[str], n_behind: int) -> int:
    """Return the most bytes of shards that are begun and not yet gone, at any time.

    Args:
        n_behind: number of shards that may be on their way while the next is converted.
    """
    waits_for_checksum = is_remote(plan.source)
    left = [shard for shard in plan.shards if shard.file_name not in done]
    sources = [{source.path.name for tensor in shard.tensors for source in tensor.shards} for shard in left]
    last_need = {name: i for i, names in enumerate(sources) for name in names}
    # A file that is needed only for its scales is finished after all others.
    read = {tensor.shard.path.name for shard in left for tensor in shard.tensors}
    last_need |= dict.fromkeys(last_need.keys() - read, len(left) - 1)
    gone_after = [
        max((last_need[name] for name in names), default=i) if waits_for_checksum else i
        for i, names in enumerate(sources)
    ]
    # While shard i is converted, all that was handed over `n_behind` shards ago is through.
    return max(
        (
            sum(shard.n_bytes for shard, gone in zip(left[: i + 1], gone_after, strict=False) if gone >= i - n_behind)
            for i in range(len(left))
        ),
        default=0,
    )
