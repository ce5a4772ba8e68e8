"""In which order a plan reads its source shards, and from where on it needs each of them still.

What passes by as a stream can be let go of when no tensor that comes later lies before it. Tensors come in the order of
their bytes, so that is nearly always the end of what was read last; matrices that are read column by column, and views
of one storage, are the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container

from int8convert.checkpoint.rows import Block, largest_block_bytes
from int8convert.checkpoint.shard_access import ShardAccess
from int8convert.checkpoint.source import SourceShard
from int8convert.planning.plan import PlannedTensor, ShardedPlan

MakeAccess = Callable[["ReadingOrder", Collection[str]], ShardAccess]
"""Access to the shards of a reading order; some files, by name, came with wrong bytes before."""

_AHEAD_BYTES = 48 << 20
"""What may come before it is asked for: some tenths of a second at a GB/s."""


class ReadingOrder:
    """Of the shards of a plan that are still to be converted.

    Args:
        plan: what is read.
        done: names of output shards that are finished.

    Attributes:
        shards: source shards, in the order of their first tensor; behind them those of which only scales are needed.
        scales: of FP8 and int8 codes; they are read before everything else.
    """

    def __init__(self, plan: ShardedPlan, done: Container[str] = ()) -> None:
        tensors = [tensor for shard in plan.shards if shard.file_name not in done for tensor in shard.tensors]
        shards: dict[str, SourceShard] = {}
        for tensor in tensors:
            shards.setdefault(tensor.shard.path.name, tensor.shard)
        self.scales = [tensor.scale for tensor in tensors if tensor.scale is not None]
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
        """The first byte of a shard that is read."""
        return self._first[shard.path.name]

    def needed_from(self, tensor: PlannedTensor, block: Block, is_last: bool) -> int:
        """The first byte of a tensor's shard that is needed once this block of it was read, and all before it."""
        later = self._next[tensor.output_name]
        if is_last:
            return later
        if tensor.source.strides is None and block.offset is not None:
            return min(block.offset + len(block.data), later)
        return min(tensor.source.offset, later)

    def window_bytes(self, n_workers: int) -> int:
        """Memory in which a stream can hold what is read at a time, and some that comes before it is asked for."""
        return max(self._spans) + n_workers * self._largest_block + _AHEAD_BYTES
