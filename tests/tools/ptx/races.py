"""Who touched which piece of shared memory since the last barrier, and whether that is a race.

A piece is the largest power of two, at most 16 bytes, that divides every access seen so far and every variable. An
actor is a thread at a moment: `epoch * STEP + thread + 1`, where the epoch of a warp grows at each of its
`bar.warp.sync`. Two accesses of one warp in different epochs are ordered, those of different warps only by a barrier of
the block, which empties the ledger of that block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STEP = 1 << 12
SEVERAL_LANES = 1 << 10
"""Added to a warp's number + 1: several of its lanes."""
SEVERAL_WARPS = STEP - 1
ATOMIC = STEP - 2
"""The actor of atomic and volatile accesses, which race with all others but not with each other."""


def actor_of(thread: Array, epoch: Array) -> Array:
    """Actors of threads (0 to 1023 within their block) in the epochs of their warps."""
    actors: Array = epoch * STEP + thread + 1
    return actors


def _warp(stamp: Array) -> Array:
    low = stamp & (STEP - 1)
    warps: Array = np.where(low <= SEVERAL_LANES, (low - 1) >> 5, low - SEVERAL_LANES - 1)
    return warps


def _is_unordered(stamp: Array, actor: Array) -> Array:
    """Whether an access stamped so and one of the actor now are two threads' without a barrier in between."""
    is_other: Array = (stamp != 0) & ((stamp ^ actor) & (STEP - 1) != 0)
    if not is_other.any():
        return is_other
    is_ordered = (_warp(stamp) == _warp(actor)) & (stamp >> 12 < actor >> 12)
    unordered: Array = is_other & ~is_ordered
    return unordered


class Ledger:
    """States, last writer and readers of every piece of n_rows rows."""

    GAP, UNWRITTEN, WRITTEN, IN_FLIGHT = range(4)

    def __init__(self, n_rows: int, extents: list[tuple[int, int]], row_bytes: int) -> None:
        self.n_rows, self.piece = n_rows, 16
        while any(offset % self.piece or n_bytes % self.piece for offset, n_bytes in extents):
            self.piece //= 2
        row = np.zeros(row_bytes // self.piece, np.uint8)
        for offset, n_bytes in extents:
            row[offset // self.piece : (offset + n_bytes) // self.piece] = self.UNWRITTEN
        self._state = np.tile(row, n_rows)
        self._writer = np.zeros(self._state.size, np.int64)
        self._reader = np.zeros(self._state.size, np.int64)

    def refine(self, size: int) -> None:
        """Make pieces no larger than an access."""
        if size < self.piece:
            factor, self.piece = self.piece // size, size
            self._state, self._writer, self._reader = (
                np.repeat(each, factor) for each in (self._state, self._writer, self._reader)
            )

    def states(self, index: Array, size: int) -> Array:
        return self._state[self._pieces(index, size)]

    def set_states(self, index: Array, size: int, state: int) -> None:
        self._state[self._pieces(index, size)] = state

    def note_read(self, index: Array, size: int, actors: Array) -> Array:
        """Note reads; False where another thread's write is unordered with one. [n, pieces]"""
        pieces, actor = self._pieces(index, size), actors[:, None]
        readers = self._reader[pieces]
        unordered = _is_unordered(readers, actor)
        stamps = np.broadcast_to(actor, pieces.shape)
        if unordered.any():
            stamps = np.where(unordered, _joined(readers, actor), actor)
        self._reader[pieces] = stamps
        # Lanes that read one piece in the same instruction overwrite each other's stamp: join them, warps last.
        left = self._reader[pieces]
        if (lost := left != stamps).any():
            joined = _joined(left[lost], stamps[lost])
            for several in (False, True):
                chosen = (joined & (STEP - 1) == SEVERAL_WARPS) == several
                self._reader[pieces[lost][chosen]] = joined[chosen]
        fine: Array = ~_is_unordered(self._writer[pieces], actor)
        return fine

    def note_write(self, index: Array, size: int, actors: Array) -> Array:
        """Note writes; True where another thread, unordered with one, wrote or read. [n, pieces]"""
        pieces, actor = self._pieces(index, size), actors[:, None]
        racing: Array = _is_unordered(self._writer[pieces], actor) | _is_unordered(self._reader[pieces], actor)
        self._writer[pieces] = actor
        return racing

    def pass_barrier(self, is_released: Array) -> None:
        """Order everything so far before everything to come, in the rows (bool [n_rows]) whose barrier is passed."""
        for each in (self._writer, self._reader):
            each.reshape(self.n_rows, -1)[is_released] = 0

    def _pieces(self, index: Array, size: int) -> Array:
        pieces: Array = (index // self.piece)[:, None] + np.arange(size // self.piece)
        return pieces


def _joined(stamp: Array, actor: Array) -> Array:
    """The stamp of both: several lanes of the one warp, in the later epoch, or several warps."""
    warp = _warp(stamp)
    is_one_warp = (warp == _warp(actor)) & (stamp & (STEP - 1) != SEVERAL_WARPS)
    epoch = np.maximum(stamp >> 12, actor >> 12)
    joined: Array = np.where(is_one_warp, epoch * STEP + SEVERAL_LANES + warp + 1, SEVERAL_WARPS)
    return joined
