"""The blocks of one shard: several threads take them in reading order, and take turns where order matters."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from int8convert.checkpoint.rows import Scratch
from int8convert.checkpoint.shard_access import OrderedReader, ShardAccess
from int8convert.checkpoint.source import ShardReader, reading
from int8convert.conversion.calibrated_rows import CalibrationInputs
from int8convert.conversion.commit import ConvertedShard
from int8convert.conversion.tensors import BlockCounter, tensor_task
from int8convert.events import EventSink
from int8convert.planning.plan import PlannedShard, PlannedTensor
from int8convert.planning.reading_order import ReadingOrder
from int8convert.trace import span


class Turns:
    """Lets threads pass one at a time, in the order of their numbers."""

    def __init__(self) -> None:
        self._next = 0
        self._changed = threading.Condition()
        self.is_closed = False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait for the turn of `number`; after `close`, return at once."""
        with self._changed, span("wait"):
            self._changed.wait_for(lambda: self.is_closed or self._next == number)
        yield
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Release all threads that wait."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows of a tensor from `begin` to before `end`.

    Attributes:
        in_order: the reader that is told of the block in its turn; None if no reader is.
    """

    tensor: PlannedTensor
    counter: BlockCounter
    begin: int
    end: int
    is_last: bool
    in_order: OrderedReader | None
    turn: int


class ShardBlocks:
    """The blocks of one shard, in reading order, for several threads to take."""

    def __init__(
        self,
        shard: PlannedShard,
        one: ConvertedShard,
        open_readers: ExitStack,
        access: ShardAccess,
        order: ReadingOrder,
        emit: EventSink,
        inputs: CalibrationInputs,
    ) -> None:
        self.turns = Turns()
        self._shard = shard
        self._one = one
        self._access = access
        self._order = order
        self._emit = emit
        self._inputs = inputs
        self._lock = threading.Lock()
        self._blocks = self._cut(open_readers)

    def _cut(self, open_readers: ExitStack) -> Iterator[_Block]:
        """Yield blocks, and open source shards when they are reached."""
        turns = itertools.count()
        ordered: dict[str, OrderedReader] = {}
        unordered: dict[str, ShardReader] = {}
        for tensor in self._shard.tensors:
            name = tensor.shard.path.name
            is_beside = tensor.is_beside_codes
            with reading(name):
                if is_beside and name not in unordered:
                    unordered[name] = open_readers.enter_context(closing(tensor.shard.open()))
                elif not is_beside and name not in ordered:
                    ordered[name] = open_readers.enter_context(closing(self._access.open(tensor.shard)))
            reader = unordered[name] if is_beside else ordered[name]
            task = tensor_task(tensor, reader, self._one.writer, self._inputs)
            ranges = list(task.blocks())
            counter = BlockCounter(task, len(ranges))
            in_order = None if is_beside or not ordered[name].needs_order else ordered[name]
            for i, (begin, end) in enumerate(ranges):
                turn = next(turns) if in_order is not None else 0
                yield _Block(tensor, counter, begin, end, i == len(ranges) - 1, in_order, turn)

    def work(self, scratch: Scratch) -> None:
        """Take and finish blocks until none is left. One call for each thread."""
        try:
            while not self.turns.is_closed:
                if not self._work_on_one(scratch):
                    return
        except BaseException:
            self.turns.close()
            raise

    def _work_on_one(self, scratch: Scratch) -> bool:
        with self._lock:
            block = next(self._blocks, None)
        if block is None:
            return False
        task, name = block.counter.task, block.tensor.shard.path.name
        with reading(name):
            raw = task.read(block.begin, block.end, scratch)
        if block.in_order is not None:
            with self.turns.turn(block.turn), reading(name):
                if not self.turns.is_closed:
                    data = raw.data.data if raw.offset is not None else None
                    needed_from = self._order.needed_from(block.tensor, raw, block.is_last)
                    block.in_order.read_on(data, raw.offset or 0, needed_from)
        with span("convert", len(raw.data)):
            task.convert(raw, block.begin, block.end, scratch)  # last: nobody has to wait for it
        if block.counter.count_down():
            event = task.finish()
            self._one.record(event)
            self._emit(event)
        return True
