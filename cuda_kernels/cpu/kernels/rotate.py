"""Rotations of blocks of columns or rows by the regular Hadamard matrix; see `reference.rotate`.

Cost: 7 additions and one multiplication for four values, for each factor of 4 in the block's size. Threads are left out
on purpose: the callers run one per core.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.compiled import compiled

_HALF = np.float32(0.5)


@compiled()
def _neighbours(row):  # type: ignore[no-untyped-def]
    """Take the step between neighbours."""
    for k in range(0, row.size, 4):
        x0, x1, x2, x3 = row[k], row[k + 1], row[k + 2], row[k + 3]
        half = ((x0 + x1) + (x2 + x3)) * _HALF
        row[k], row[k + 1], row[k + 2], row[k + 3] = half - x3, half - x2, half - x1, half - x0


@compiled()
def _fours(row):  # type: ignore[no-untyped-def]
    """Take the step at a distance of 4; with the distance as a constant, one vector holds four values."""
    for begin in range(0, row.size, 16):
        for k in range(begin, begin + 4):
            x0, x1, x2, x3 = row[k], row[k + 4], row[k + 8], row[k + 12]
            half = ((x0 + x1) + (x2 + x3)) * _HALF
            row[k], row[k + 4], row[k + 8], row[k + 12] = half - x3, half - x2, half - x1, half - x0


@compiled()
def _step(values, distance):  # type: ignore[no-untyped-def]
    """Take the step at a larger distance."""
    for begin in range(0, values.size, 4 * distance):
        for k in range(begin, begin + distance):
            x0, x1 = values[k], values[k + distance]
            x2, x3 = values[k + 2 * distance], values[k + 3 * distance]
            half = ((x0 + x1) + (x2 + x3)) * _HALF
            values[k], values[k + distance] = half - x3, half - x2
            values[k + 2 * distance], values[k + 3 * distance] = half - x1, half - x0


@compiled()
def rotate_columns(values, size):  # type: ignore[no-untyped-def]
    for r in range(values.shape[0]):
        if size >= 4:
            _neighbours(values[r])
        if size >= 16:
            _fours(values[r])
        distance = 16
        while distance < size:
            _step(values[r], distance)
            distance *= 4


@compiled()
def rotate_rows(values, columns, size):  # type: ignore[no-untyped-def]
    distance = columns
    while distance < size * columns:
        _step(values, distance)
        distance *= 4
