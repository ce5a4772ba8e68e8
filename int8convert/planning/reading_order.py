"""Computes the order in which a plan reads its source shards, and the first byte of each that is still needed.

A stream can drop the bytes before the first one that a later tensor needs. Tensors are read in the order of their
bytes, so that is nearly always the end of the last block. Exceptions are matrices that are read column by column, and
views of one storage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container

from int8convert.checkpoint.rows import Block, largest_block_bytes
from int8convert.checkpoint.shard_access import ShardAccess
from int8convert.checkpoint.source import SourceShard
from int8convert.planning.export_plan import ShardedPlan
from int8convert.planning.plan import PlannedTensor

MakeAccess = Callable[["ReadingOrder", Collection[str]], ShardAccess]
"""Function of a reading order, and of the names of files whose bytes were wrong before, that opens the shards."""

_AHEAD_BYTES = 48 << 20
"""Bytes of prefetch: some tenths of a second at 1 GB/s."""


class ReadingOrder:
    """The order in which the pending shards of a plan are read.

    Args:
        done: names of finished output shards.

    Attributes:
        shards: source shards in the order of their first tensor; then those that only scales are read from.
        scales: scales and zero points of FP8 and int8 codes, and gains that are folded: read first, by
            `SourceShard.open`.
    """

    def __init__(self, plan: ShardedPlan, done: Container[str] = ()) -> None:
        pending = [tensor for shard in plan.shards if shard.file_name not in done for tensor in shard.tensors]
        tensors = [tensor for tensor in pending if not tensor.is_beside_codes]
        shards: dict[str, SourceShard] = {}
        for tensor in tensors:
            shards.setdefault(tensor.shard.path.name, tensor.shard)
        self.scales = [scale for tensor in pending for scale in tensor.read_ahead]
        for scale in sorted(self.scales, key=lambda scale: scale.shard.path.name):
            shards.setdefault(scale.shard.path.name, scale.shard)
        self.shards = tuple(shards.values())
        self._next: dict[str, int] = {}
        self._first = {name: shard.n_bytes for name, shard in shards.items()}
        self._spans = [0]
        last: set[str] = set()
        for tensor in reversed(tensors):
            name, begin = tensor.shard.path.name, tensor.source.offset
            later = self._first[name]
            # Empty tensors at the end need no byte, but are read after what is before them.
            self._next[tensor.output_name] = min(later, tensor.shard.n_bytes - 1) if name in last else later
            last.add(name)
            end = begin + tensor.source.span_bytes
            if tensor.source.strides is not None or later < end:
                self._spans.append(end - min(begin, later))
            self._first[name] = min(begin, later)
        self._largest_block = max((largest_block_bytes(tensor.source) for tensor in tensors), default=0)

    def first_needed(self, shard: SourceShard) -> int:
        """Return the first byte of a shard that is read."""
        return self._first[shard.path.name]

    def needed_from(self, tensor: PlannedTensor, block: Block, is_last: bool) -> int:
        """Return the first byte of a tensor's shard that is needed after this block and all before it."""
        later = self._next[tensor.output_name]
        if is_last:
            return later
        if tensor.source.strides is None and block.offset is not None:
            return min(block.offset + len(block.data), later)
        return min(tensor.source.offset, later)

    @property
    def prefetched_bytes(self) -> int:
        """Bytes that are read before the shards, and are in memory until the end if they come from the Hub."""
        return sum(scale.stored.span_bytes for scale in self.scales)

    def window_bytes(self, n_workers: int) -> int:
        """Return the bytes of memory that a stream needs for the blocks in work and for its prefetch."""
        return max(self._spans) + n_workers * self._largest_block + _AHEAD_BYTES
