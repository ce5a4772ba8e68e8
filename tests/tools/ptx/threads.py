"""The threads of some blocks in lockstep: registers, who is active, and what the instructions do to memory.

A register is one array over all threads, never changed in place: a new value replaces the array, mixed with the old one
where not every live thread is active. Blocks are padded to whole warps with threads that never run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, WORDS, Fault, Memory, Scratch
from tests.tools.ptx.races import ATOMIC, actor_of

Array = npt.NDArray[Any]

WARP = 32
UNSET = 0xA5A5A5A5A5A5A5A5
"""What a register holds before it is written: nothing that a wrong kernel would get away with."""
SPECIAL_REGISTERS = {f"%{base}.{axis}" for base in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
SPECIAL_REGISTERS |= {f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")}
SPECIAL_REGISTERS |= {"%laneid", "%warpid", "%dynamic_smem_size"}
REGISTER_TYPES: dict[int, type] = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Trace:
    """What a launch executed.

    executed: opcode as written, to how many threads executed it.
    approximate: those of them whose result the hardware only approximates; here it is the correctly rounded one.
    loaded_bytes, stored_bytes: by state space, summed over threads.
    """

    executed: Counter[str] = field(default_factory=Counter)
    approximate: Counter[str] = field(default_factory=Counter)
    loaded_bytes: Counter[str] = field(default_factory=Counter)
    stored_bytes: Counter[str] = field(default_factory=Counter)


class Active:
    """The threads that execute an instruction: mask [n], how many, and their indices."""

    def __init__(self, mask: Array) -> None:
        self.mask, self.count = mask, int(np.count_nonzero(mask))
        self._lanes: Array | None = None

    @property
    def lanes(self) -> Array:
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes


@dataclass
class Copies:
    """One cp.async instruction's copies that are not yet waited for; `group` is the thread's running number."""

    lanes: Array
    group: Array
    offsets: Array
    values: Array
    size: int


class Threads:
    """The threads of `blocks` (linear indices) of a grid, all alive at the kernel's first instruction."""

    def __init__(
        self, blocks: Array, grid: tuple[int, int, int], block: tuple[int, int, int], register_bytes: list[int]
    ) -> None:
        n_threads = block[0] * block[1] * block[2]
        padded = -(-n_threads // WARP) * WARP
        self.grid, self.block = grid, block
        self.n_blocks, self.n = len(blocks), len(blocks) * padded
        self.row = np.repeat(np.arange(len(blocks)), padded)
        self.block_index = np.repeat(blocks, padded)
        self.thread = np.tile(np.arange(padded), len(blocks))
        self.alive = self.thread < n_threads
        self.registers: list[Array] = [
            np.broadcast_to(np.uint64(UNSET).astype(REGISTER_TYPES[size]), self.n) for size in register_bytes
        ]
        self.active = Active(self.alive)
        self.is_alone = True
        self.carry = np.zeros(self.n, bool)
        self.epoch = np.zeros(self.n // WARP, np.int64)
        self.copies: list[Copies] = []
        self.copy_group = np.zeros(self.n, np.int64)
        self.parameters = b""
        self.shared_bytes = 0
        self.trace = Trace()
        self.memory: Memory
        self.shared: Scratch
        self.local: Scratch

    def write(self, register: int, value: Array) -> None:
        """Give a register its value in the active threads; threads that have ended do not count."""
        if self.is_alone:
            self.registers[register] = value if value.shape else np.broadcast_to(value, self.n)
        else:
            self.registers[register] = np.where(self.active.mask, value, self.registers[register])

    def chosen(self, value: Array) -> Array:
        """The active threads' part of a value."""
        if not value.shape:
            return np.broadcast_to(value, self.active.count)
        return value if self.active.count == self.n else value[self.active.lanes]

    def spread(self, chosen: Array) -> Array:
        """The inverse of `chosen`; anything for the other threads."""
        if self.active.count == self.n:
            return chosen
        value = np.zeros(self.n, chosen.dtype)
        value[self.active.lanes] = chosen
        return value

    def special(self, name: str) -> Array:
        """A special register's value, uint32."""
        if name in ("%laneid", "%warpid"):
            return (self.thread % WARP if name == "%laneid" else self.thread // WARP).astype(np.uint32)
        if name == "%dynamic_smem_size":
            return np.uint32(self.shared_bytes)
        base, _, axis = name[1:].partition(".")
        if base.startswith("lanemask_"):
            return self._lane_mask(base.removeprefix("lanemask_"))
        extents, index = (self.block, self.thread) if base in ("tid", "ntid") else (self.grid, self.block_index)
        place = "xyz".index(axis)
        if base.startswith("n"):
            return np.uint32(extents[place])
        stride = int(np.prod(extents[:place], dtype=np.int64))
        return (index // stride % extents[place]).astype(np.uint32)

    def _lane_mask(self, which: str) -> Array:
        lane = (self.thread % WARP).astype(np.int64)
        one = np.int64(1) << lane
        below, full = one - 1, (np.int64(1) << WARP) - 1
        masks = {"eq": one, "lt": below, "le": below | one, "gt": full ^ below ^ one, "ge": full ^ below}
        return masks[which].astype(np.uint32)

    def _actors(self, is_atomic: bool) -> Array:
        """The active threads as the ledger of shared memory counts them."""
        if is_atomic:
            return np.full(self.active.count, ATOMIC)
        lanes = self.active.lanes
        return actor_of(self.thread[lanes], self.epoch[lanes // WARP])

    def load(self, space: str, address: Array, size: int, is_atomic: bool = False) -> Array:
        """Words of `size` bytes at the active threads' addresses, uint64 [count].

        `is_atomic`: strong accesses, which race with the others but not with each other.
        """
        self.trace.loaded_bytes[space] += size * len(address)
        if space == "generic":
            out = np.empty(len(address), WORDS[size])
            for part, name, offsets in self._by_window(address):
                with self.only(part):
                    out[part] = self.load(name, offsets, size, is_atomic)
            return out
        with self._naming_the_lane():
            if space in ("global", "const"):
                return self.memory.load(address, size)
            if space == "shared":
                return self.shared.load(self.row[self.active.lanes], address, size, self._actors(is_atomic))
            return self.local.load(self.active.lanes, address, size, None)

    def store(self, space: str, address: Array, values: Array, size: int, is_atomic: bool = False) -> None:
        """The inverse of `load`."""
        self.trace.stored_bytes[space] += size * len(address)
        if space == "generic":
            for part, name, offsets in self._by_window(address):
                with self.only(part):
                    self.store(name, offsets, values[part], size, is_atomic)
            return
        values = np.ascontiguousarray(values)
        with self._naming_the_lane():
            if space == "global":
                self.memory.store(address, values, size, None if is_atomic else self.block_index[self.active.lanes])
            elif space == "shared":
                self.shared.store(self.row[self.active.lanes], address, values, size, self._actors(is_atomic))
            elif space == "local":
                self.local.store(self.active.lanes, address, values, size, None)
            else:
                raise Fault(f"store to {space} memory")

    @contextmanager
    def only(self, positions: Array) -> Iterator[None]:
        """Only some of the active threads are active, given by their positions among them."""
        outer, mask = self.active, np.zeros(self.n, bool)
        mask[outer.lanes[positions]] = True
        self.active = Active(mask)
        try:
            yield
        finally:
            self.active = outer

    @contextmanager
    def _naming_the_lane(self) -> Iterator[None]:
        try:
            yield
        except Fault as fault:
            if fault.lane < 0:
                fault.lane = int(self.active.lanes[fault.position])
            raise

    def _by_window(self, address: Array) -> list[tuple[Array, str, Array]]:
        windows = [("global", 0), ("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW), ("", 1 << 63)]
        parts = []
        for (name, start), (_, end) in pairwise(windows):
            part = np.flatnonzero((address >= np.uint64(start)) & (address < np.uint64(end)))
            if part.size:
                parts.append((part, name, address[part] - np.uint64(start)))
        if sum(part.size for part, _, _ in parts) < len(address):
            raise Fault("an address in no state space", int(np.argmax(address >= np.uint64(1 << 63))))
        return parts

    def start_copy(self, offsets: Array, values: Array, size: int) -> None:
        lanes = self.active.lanes
        with self._naming_the_lane():
            self.shared.start_copy(self.row[lanes], offsets, size, self._actors(False))
        self.copies.append(Copies(lanes, self.copy_group[lanes], offsets, values, size))

    def finish_copies(self, n_pending: int) -> None:
        """The active threads' copies land, those of their last `n_pending` committed groups excepted."""
        kept = []
        for copies in self.copies:
            lands = self.active.mask[copies.lanes] & (copies.group < self.copy_group[copies.lanes] - n_pending)
            if lands.any():
                lanes = copies.lanes[lands]
                actors = actor_of(self.thread[lanes], self.epoch[lanes // WARP])
                values = copies.values[lands]
                self.shared.store(self.row[lanes], copies.offsets[lands], values, copies.size, actors)
            if not lands.all():
                rest = ~lands
                kept.append(
                    Copies(
                        copies.lanes[rest], copies.group[rest], copies.offsets[rest], copies.values[rest], copies.size
                    )
                )
        self.copies = kept
