"""What an address means: global arrays with guard gaps, and the shared and local bytes of each block and thread.

Global memory is the caller's own arrays, placed at made-up addresses with gaps in between, so that a step outside an
array hits nothing. Shared and local memory are rows of one array, with a gap after every variable; a `Ledger` knows for
every piece of them what was written and who touched it since the last barrier.

Reported, by default and always:

- access outside every array, misaligned access, a store to a read-only array;
- shared or local memory that is read before it is written, or while a copy into it is under way;
- a race in shared memory: two threads of a block, no barrier of theirs in between (`bar.sync`, or within a warp
  `bar.warp.sync`), at least one writes another value than is there;
- a store to global memory of another value than another block (or another thread in the same instruction) stored in
  the same launch.

Not known: races through global memory within one block, or between a store and a load of different blocks. Writing the
value that is there already is no race here, though the standard calls it one.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tools.ptx.races import Ledger

Array = npt.NDArray[Any]

GAP_BYTES = 256
GLOBAL_START = 1 << 20
VARIABLES_START = 1 << 44
"""Module variables lie far above what callers place."""
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
WORDS: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
"""complex128 is the one NumPy type of 16 bytes that is gathered fast; its bits are never computed with."""


class Fault(Exception):
    """A thread did what no thread may: `position` among those that executed, `lane` among all once that is known."""

    def __init__(self, message: str, position: int = 0, lane: int = -1) -> None:
        super().__init__(message)
        self.position, self.lane = position, lane


def first(faulty: Array) -> int:
    return int(np.argmax(faulty))


def check_alignment(addresses: Array, size: int) -> None:
    if size > 1 and (misaligned := (addresses & addresses.dtype.type(size - 1)) != 0).any():
        position = first(misaligned)
        raise Fault(f"misaligned access: {size} bytes at {int(addresses[position]):#x}", position)


class Region:
    """One placed array: [n_bytes] at `base`."""

    def __init__(self, base: int, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("only a C-contiguous array can be placed: the kernel sees its bytes")
        self.base, self.n_bytes, self.is_writable = base, array.nbytes, array.flags.writeable
        self._bytes = array.reshape(-1).view(np.uint8)
        self._views: dict[int, Array] = {}
        self.granule = 0
        self.writers = np.empty(0, np.int32)

    def words(self, size: int) -> Array:
        if size not in self._views:
            self._views[size] = self._bytes[: self.n_bytes // size * size].view(WORDS[size])
        return self._views[size]

    def store(self, offsets: Array, values: Array, size: int, blocks: Array) -> None:
        """Store words and remember which block did; report another block's different value underneath."""
        view, index = self.words(size), offsets // size
        self._note_writers(offsets, values, size, blocks)
        view[index] = values
        unit = WORDS[min(size, 8)]
        if (lost := view[index].view(unit) != values.view(unit)).any():
            position = first(lost.reshape(len(offsets), -1).any(axis=1))
            address = self.base + int(offsets[position])
            raise Fault(f"threads store different values at {address:#x} in one instruction", position)

    def _note_writers(self, offsets: Array, values: Array, size: int, blocks: Array) -> None:
        if self.granule == 0:
            self.granule, self.writers = size, np.zeros(-(-self.n_bytes // size), np.int32)
        elif size < self.granule:
            self.writers, self.granule = np.repeat(self.writers, self.granule // size), size
        n_pieces = size // self.granule
        pieces = (offsets // self.granule)[:, None] + np.arange(n_pieces)
        writers, stamps = self.writers[pieces], (blocks + 1)[:, None]
        if (theirs := (writers != 0) & (writers != stamps)).any():
            old, new = (
                np.ascontiguousarray(each).view(np.uint8) for each in (self.words(size)[offsets // size], values)
            )
            different = (old != new).reshape(len(offsets), n_pieces, self.granule).any(axis=2)
            if (theirs & different).any():
                position = first((theirs & different).any(axis=1))
                other = int(writers[position][writers[position] != 0][0]) - 1
                raise Fault(f"block {other} stored another value at {self.base + int(offsets[position]):#x}", position)
        self.writers[pieces] = stamps


class Memory:
    """Global memory: the arrays that were placed in it."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._bases: list[int] = []
        self._top = GLOBAL_START

    def place(self, array: Array) -> int:
        """Make an array addressable and return its address, a multiple of 256; the array stays the storage.

        A store to an array that NumPy holds read-only is reported like one outside every array.
        """
        region = Region(self._top, array)
        place = bisect_right(self._bases, region.base)
        self._regions.insert(place, region)
        self._bases.insert(place, region.base)
        self._top = (region.base + region.n_bytes + 2 * GAP_BYTES - 1) // GAP_BYTES * GAP_BYTES
        return region.base

    def start_launch(self, variables: list[tuple[int, Array]]) -> None:
        """Forget who stored where, the launches of one stream come one after the other; place a module's variables."""
        kept = [region for region in self._regions if region.base < VARIABLES_START]
        self._regions = kept + [Region(address, content) for address, content in variables]
        self._bases = [region.base for region in self._regions]
        for region in kept:
            region.granule, region.writers = 0, np.empty(0, np.int32)

    def load(self, addresses: Array, size: int) -> Array:
        """Words of `size` bytes, one for each address."""
        check_alignment(addresses, size)
        out = np.empty(len(addresses), WORDS[size])
        for chosen, region, offsets in self._located(addresses, size):
            out[chosen] = region.words(size)[offsets // size]
        return out

    def store(self, addresses: Array, values: Array, size: int, blocks: Array | None) -> None:
        """Store words of `size` bytes; `blocks` are the storing threads', None for atomic stores."""
        check_alignment(addresses, size)
        for chosen, region, offsets in self._located(addresses, size):
            if not region.is_writable:
                where = np.arange(len(addresses))[chosen]
                raise Fault(f"store to a read-only array at {int(addresses[where[0]]):#x}", int(where[0]))
            if blocks is None:
                region.words(size)[offsets // size] = values[chosen]
                continue
            try:
                region.store(offsets, values[chosen], size, blocks[chosen])
            except Fault as fault:
                raise Fault(str(fault), int(np.arange(len(addresses))[chosen][fault.position])) from None

    def _located(self, addresses: Array, size: int) -> list[tuple[Any, Region, Array]]:
        """The addresses by region: which of them, the region, their offsets in it."""
        low, high = int(addresses.min()), int(addresses.max())
        region = self._regions[max(bisect_right(self._bases, low) - 1, 0)] if self._regions else None
        if region is not None and region.base <= low and high + size <= region.base + region.n_bytes:
            return [(slice(None), region, (addresses - np.uint64(region.base)).astype(np.int64))]
        owners = np.searchsorted(np.array(self._bases, np.uint64), addresses, side="right").astype(np.int64) - 1
        located: list[tuple[Any, Region, Array]] = []
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            if owner < 0:
                raise Fault(f"access to {int(addresses[chosen[0]]):#x}, where nothing is placed", int(chosen[0]))
            region = self._regions[owner]
            offsets = (addresses[chosen] - np.uint64(region.base)).astype(np.int64)
            if (outside := (offsets + size > region.n_bytes) | (offsets < 0)).any():
                position = first(outside)
                address, over = int(addresses[chosen[position]]), int(offsets[position]) + size - region.n_bytes
                message = (
                    f"access to {size} bytes at {address:#x}, {over} past the end of the array at {region.base:#x}"
                )
                raise Fault(f"{message} ({region.n_bytes} bytes)", int(chosen[position]))
            located.append((chosen, region, offsets))
        return located


class Scratch:
    """Shared memory of blocks, or local memory of threads: rows of bytes with gaps, and what happened to them.

    Args:
        space: "shared" or "local", for messages.
        n_rows: how many blocks or threads.
        extents: (offset, n_bytes) of every variable, within a row of `row_bytes`, a multiple of 16.
    """

    def __init__(self, space: str, n_rows: int, extents: list[tuple[int, int]], row_bytes: int) -> None:
        self.space, self.row_bytes = space, row_bytes
        self._bytes = np.zeros(n_rows * row_bytes, np.uint8)
        self.ledger = Ledger(n_rows, extents, row_bytes)

    def load(self, rows: Array, offsets: Array, size: int, actors: Array | None) -> Array:
        """Words of `size` bytes; `actors` are the threads as the ledger counts them, None for memory of one's own."""
        index = self._index(rows, offsets, size)
        self._require(self.ledger.states(index, size) == Ledger.WRITTEN, offsets, "was never written, or is in flight")
        if actors is not None:
            self._require(self.ledger.note_read(index, size, actors), offsets, "races with a write")
        return self._bytes.view(WORDS[size])[index // size]

    def store(self, rows: Array, offsets: Array, values: Array, size: int, actors: Array | None) -> None:
        index = self._index(rows, offsets, size)
        self.ledger.set_states(index, size, Ledger.WRITTEN)
        view, words = self._bytes.view(WORDS[size]), index // size
        if actors is not None and (racing := self.ledger.note_write(index, size, actors)).any():
            changed = (view[words].view(np.uint8) != values.view(np.uint8)).reshape(*racing.shape, -1).any(axis=2)
            self._require(~(racing & changed), offsets, "races with another thread")
        view[words] = values
        unit = WORDS[min(size, 8)]
        if (lost := view[words].view(unit) != values.view(unit)).any():
            self._require(~lost, offsets, "gets different values in one instruction")

    def start_copy(self, rows: Array, offsets: Array, size: int, actors: Array) -> None:
        """An asynchronous copy into these bytes begins: until it is waited for, nobody may look at them."""
        index = self._index(rows, offsets, size)
        self._require(~self.ledger.note_write(index, size, actors), offsets, "races with another thread")
        self.ledger.set_states(index, size, Ledger.IN_FLIGHT)

    def _index(self, rows: Array, offsets: Array, size: int) -> Array:
        check_alignment(offsets, size)
        wide = offsets.astype(np.uint64)
        is_inside = (wide < self.row_bytes) & (wide + np.uint64(size) <= self.row_bytes)
        self._require(is_inside, offsets, "is outside of every variable")
        index: Array = rows * self.row_bytes + wide.astype(np.int64)
        self.ledger.refine(size)
        self._require(self.ledger.states(index, size) != Ledger.GAP, offsets, "is outside of every variable")
        return index

    def _require(self, good: Array, offsets: Array, what: str) -> None:
        if not good.all():
            position = first(~good.reshape(len(offsets), -1).all(axis=1))
            raise Fault(f"{self.space} memory at {int(offsets[position]):#x} {what}", position)
