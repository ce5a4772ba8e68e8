"""Execute a kernel's PTX in NumPy, all threads of some blocks at once.

1. The text is parsed and every instruction decoded to a closure, once per text.
2. Blocks run in groups of about 4,096 threads. The threads of a group that stand at one instruction execute it
   together; of several such sets, the one at the lowest instruction goes first, and sets that meet are joined.
   Compilers lay out code so that branches meet again further down, so this joins what the hardware would join. Nothing
   depends on it, since whatever needs several threads waits for them: a `bar.sync` until all living threads of the
   block stand at one, a warp instruction until all living threads of its membermask stand at such a one.
3. What may not happen is a PtxError with thread, block and instruction: see `memory.py`, and here a barrier that not
   all living threads of a block reach, a warp instruction whose members never come, a division by zero, and more
   instructions than `max_steps`.

Not known: time, caches, the order in which the hardware runs warps, spinning on what another thread has yet to store
(it ends at `max_steps`), and what ptxas makes of a `mul` and an `add` without `.rn`, which it may fuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.instructions import Control, Operation
from tests.tools.ptx.memory import Fault, Memory, Scratch
from tests.tools.ptx.program import Program, initial_content, load, pack_arguments
from tests.tools.ptx.threads import WARP, Active, Threads, Trace
from tests.tools.ptx.warp import ballot

Array = npt.NDArray[Any]

THREADS_AT_ONCE = 4096
MAX_STEPS = 1_000_000


class PtxError(RuntimeError):
    """The kernel does what no kernel may do."""


def execute(
    ptx_text: str,
    grid: tuple[int, int, int] | int,
    block: tuple[int, int, int] | int,
    args: Sequence[int | float | bytes | np.generic],
    memory: Memory,
    shared_bytes: int = 0,
    kernel: str | None = None,
    blocks_at_once: int | None = None,
    max_steps: int = MAX_STEPS,
) -> Trace:
    """Run one kernel of a PTX text to its end.

    Args:
        args: one for each kernel parameter; pointers are what `memory.place` returned.
        shared_bytes: dynamic shared memory, in bytes.
        kernel: its name, where the text has more than one.
        blocks_at_once: how many blocks run in lockstep; 1 runs them in turn. A right kernel cannot tell.
        max_steps: instructions that a group of blocks may execute.

    Raises:
        PtxError: a thread did something wrong, named in the message.
        NotImplementedError: an instruction is not known exactly.
    """
    grid, block = ((each, 1, 1) if isinstance(each, int) else each for each in (grid, block))
    program = load(ptx_text, kernel)
    n_threads, n_blocks = int(np.prod(block)), int(np.prod(grid))
    if min(n_threads, n_blocks) < 1 or n_threads > 1024:
        raise ValueError(f"grid {grid} of blocks {block}")
    if 0 < program.kernel.max_threads < n_threads:
        raise ValueError(f"{n_threads} threads in a block, the kernel allows {program.kernel.max_threads}")
    trace, parameters = Trace(), pack_arguments(program, args)
    memory.start_launch([(address, initial_content(variable)) for address, variable in program.variables])
    counts = np.zeros(len(program.operations), np.int64)
    step = blocks_at_once or max(THREADS_AT_ONCE // n_threads, 1)
    with np.errstate(all="ignore"):
        for start in range(0, n_blocks, step):
            blocks = np.arange(start, min(start + step, n_blocks))
            threads = Threads(blocks, grid, block, program.register_bytes)
            threads.memory, threads.parameters, threads.trace = memory, parameters, trace
            _give_scratch(program, threads, shared_bytes)
            _Run(program, threads, counts, max_steps).finish()
    for operation, count in zip(program.operations, counts.tolist(), strict=True):
        if count:
            trace.executed[operation.source.opcode] += count
            if operation.is_approximate:
                trace.approximate[operation.source.opcode] += count
    return trace


def _give_scratch(program: Program, threads: Threads, shared_bytes: int) -> None:
    threads.shared_bytes = shared_bytes
    shared = program.shared_extents + ([(program.dynamic_offset, shared_bytes)] if shared_bytes else [])
    threads.shared = Scratch("shared", threads.n_blocks, shared, _row_bytes(shared))
    threads.local = Scratch("local", threads.n, program.local_extents, _row_bytes(program.local_extents))


def _row_bytes(extents: list[tuple[int, int]]) -> int:
    return -(-max((offset + n_bytes for offset, n_bytes in extents), default=0) // 16) * 16


class _Run:
    """The threads on their way through the program.

    `ready` maps an instruction to the mask of the threads that stand before it, `waiting` likewise for those that wait
    there for others.
    """

    def __init__(self, program: Program, threads: Threads, counts: Array, max_steps: int) -> None:
        self.program, self.threads, self.counts = program, threads, counts
        self.steps_left = max_steps
        self.ready: dict[int, Array] = {0: threads.alive}
        self.waiting: dict[int, Array] = {}

    def finish(self) -> None:
        while self.ready or self.waiting:
            if self.ready:
                self._advance(min(self.ready))
            elif not self._match():
                self._pass_barrier()

    def _advance(self, position: int) -> None:
        """Run the threads at the lowest instruction until others may be lower."""
        active = Active(self._arrived(position))
        operations, threads = self.program.operations, self.threads
        while True:
            if position >= len(operations):
                threads.alive = threads.alive & ~active.mask
                return
            operation = operations[position]
            self.steps_left -= 1
            if self.steps_left < 0:
                raise self._error(operation, active, "too many instructions: does the kernel end?")
            if operation.control is Control.NEXT and operation.guard is None:
                threads.active, threads.is_alone = active, not (self.ready or self.waiting)
                self._execute(operation, position)
            elif operation.control is Control.WARP:
                remaining = self._execute_together(position, active)
                if remaining is None:
                    return
                active = remaining
            elif not self._execute_guarded(operation, position, active):
                return
            position += 1
            if position in self.ready or position in self.waiting:
                self._arrive(position, active.mask)
                return

    def _arrived(self, position: int) -> Array:
        mask = self.ready.pop(position)
        if position in self.waiting and self.program.operations[position].control is Control.WARP:
            mask = mask | self.waiting.pop(position)
        return mask

    def _arrive(self, position: int, mask: Array) -> None:
        self.ready[position] = self.ready[position] | mask if position in self.ready else mask

    def _execute(self, operation: Operation, position: int) -> None:
        self.counts[position] += self.threads.active.count
        assert operation.step is not None
        try:
            operation.step(self.threads)
        except Fault as fault:
            raise self._error(operation, self.threads.active, str(fault), fault.lane) from None

    def _execute_guarded(self, operation: Operation, position: int, active: Active) -> bool:
        """Execute what has a predicate or changes the flow; False if the threads do not simply go on."""
        threads = self.threads
        chosen = active
        if operation.guard is not None:
            mask = active.mask & operation.guard(threads)
            chosen = active if (mask == active.mask).all() else Active(mask)
        if chosen.count == 0:
            return True
        if operation.control is Control.NEXT:
            threads.active, threads.is_alone = chosen, chosen is active and not (self.ready or self.waiting)
            self._execute(operation, position)
            return True
        self.counts[position] += chosen.count
        if chosen is not active:
            self._arrive(position + 1, active.mask & ~chosen.mask)
        if operation.control is Control.BRANCH:
            self._arrive(operation.target, chosen.mask)
        elif operation.control is Control.EXIT:
            threads.alive = threads.alive & ~chosen.mask
        else:
            self._wait(position, chosen.mask)
        return False

    def _wait(self, position: int, mask: Array) -> None:
        self.waiting[position] = self.waiting[position] | mask if position in self.waiting else mask

    def _execute_together(self, position: int, active: Active) -> Active | None:
        """Execute a warp instruction where all members have come; the others wait. None if all do."""
        complete = self._complete([(position, active.mask)])
        if not (complete == active.mask).all():
            self._wait(position, active.mask & ~complete)
            if not complete.any():
                return None
            active = Active(complete)
        self._exchange([(position, active.mask)])
        return active

    def _complete(self, places: list[tuple[int, Array]]) -> Array:
        """Which of the threads before warp instructions of one kind have all their living members there, too."""
        threads, everyone = self.threads, np.logical_or.reduce([mask for _, mask in places])
        members = self._mixed(places, -1)
        lane = np.arange(threads.n, dtype=np.uint32) % np.uint32(WARP)
        if (outsider := everyone & ((members >> lane) & np.uint32(1) == 0)).any():
            position = next(position for position, mask in places if (mask & outsider).any())
            message, first = "is not in its own membermask", int(np.argmax(outsider))
            raise self._error(self.program.operations[position], Active(everyone), message, first)
        here, alive = ballot(everyone), ballot(threads.alive)
        is_complete: Array = everyone & (members & alive & ~here == 0)
        return is_complete

    def _mixed(self, places: list[tuple[int, Array]], which: int) -> Array:
        """What the threads read as one of the sources, each at its own instruction."""
        sources = [(self.program.operations[position].exchange, mask) for position, mask in places]
        values = [(exchange.readers[which](self.threads), mask) for exchange, mask in sources if exchange]
        mixed = np.broadcast_to(values[0][0], self.threads.n)
        for value, mask in values[1:]:
            mixed = np.where(mask, value, mixed)
        return mixed

    def _exchange(self, places: list[tuple[int, Array]]) -> None:
        """Execute warp instructions of one kind, once, for the threads that stand before each."""
        threads, operations = self.threads, [self.program.operations[position] for position, _ in places]
        exchange = operations[0].exchange
        assert exchange is not None
        active = threads.active = Active(np.logical_or.reduce([mask for _, mask in places]))
        inputs = [self._mixed(places, which) for which in range(len(exchange.readers))]
        try:
            results = exchange.compute(threads, *inputs)
        except Fault as fault:
            raise self._error(operations[0], active, str(fault), fault.lane) from None
        for operation, (position, mask) in zip(operations, places, strict=True):
            threads.active = Active(mask)
            threads.is_alone = len(places) == 1 and not (self.ready or self.waiting)
            self.counts[position] += threads.active.count
            for write, result in zip(operation.exchange.writers if operation.exchange else [], results, strict=True):
                write(threads, result)

    def _match(self) -> bool:
        """Nobody can go on: let threads exchange that wait at different instructions of one kind."""
        kinds: dict[str, list[tuple[int, Array]]] = {}
        for position, mask in self.waiting.items():
            operation = self.program.operations[position]
            if operation.control is Control.WARP:
                kinds.setdefault(operation.source.opcode, []).append((position, mask))
        for places in kinds.values():
            complete = self._complete(places)
            if complete.any():
                going = [(position, mask & complete) for position, mask in places if (mask & complete).any()]
                for position, mask in places:
                    self.waiting[position] = mask & ~complete
                    if not self.waiting[position].any():
                        del self.waiting[position]
                self._exchange(going)
                for position, mask in going:
                    self._arrive(position + 1, mask)
                return True
        return False

    def _pass_barrier(self) -> None:
        """Nobody can go on: let every block pass whose living threads all stand at one bar.sync."""
        threads = self.threads
        where = np.full(threads.n, -1)
        for position, mask in self.waiting.items():
            where[mask] = position
        for position, mask in self.waiting.items():
            operation = self.program.operations[position]
            if operation.control is not Control.BARRIER:
                raise self._error(operation, Active(mask), "waits for threads of its membermask that never come")
            rows = np.unique(threads.row[mask])
            elsewhere = np.isin(threads.row, rows) & threads.alive & (where != position)
            if elsewhere.any():
                other = self.program.operations[where[np.argmax(elsewhere)]].source
                message = f"divergent barrier: other threads of the block wait at line {other.line}: {other.text}"
                raise self._error(operation, Active(mask & np.isin(threads.row, threads.row[elsewhere])), message)
        released = np.zeros(threads.n_blocks, bool)
        for mask in self.waiting.values():
            released[threads.row[mask]] = True
        threads.shared.ledger.pass_barrier(released)
        for position, mask in self.waiting.items():
            operation = self.program.operations[position]
            if operation.step is not None:
                threads.active, threads.is_alone = Active(mask), len(self.waiting) == 1
                operation.step(threads)
            self._arrive(position + 1, mask)
        self.waiting = {}

    def _error(self, operation: Operation, active: Active, message: str, lane: int = -1) -> PtxError:
        lane = lane if lane >= 0 else int(active.lanes[0])
        thread, block = self.threads.thread[lane], self.threads.block_index[lane]
        x, y, _ = self.threads.block
        place = f"thread ({thread % x}, {thread // x % y}, {thread // x // y}) of block {block}"
        return PtxError(f"{message}; {place}, line {operation.source.line}: {operation.source.text}")
