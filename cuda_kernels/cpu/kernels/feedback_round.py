"""Rounding of rows whose columns pass their errors on, and the outputs' error; see `reference.feedback_round`.

Matrices are laid out in panels of 32 columns, one vector register wide. For each panel, the products of the columns
before it are added up for all rows, a few hundred columns at a time, which a core's cache holds; then each row is
rounded column by column.

No multiplication is fused with an addition, and sums go in the order of the columns: the bits are the same on every
processor. Cost: half a multiply-add a weight and column to round, one a weight and held-out input for the error.
Threads are left out on purpose: the callers run one per core.
"""

from __future__ import annotations

import numpy as np

from cuda_kernels.cpu.kernels.compiled import compiled
from cuda_kernels.cpu.kernels.float_vectors import add, fill, load_floats, multiply, store_floats
from cuda_kernels.cpu.kernels.sizes import N_FLOATS

_DEPTH = 256
"""Columns of a panel that are multiplied at a time: 32 KB."""


@compiled()
def _add_products(rows, n_columns, panel, sums):  # type: ignore[no-untyped-def]
    """Add to `sums`, float32 [rows, 32], the product of the first columns of the rows with a panel."""
    n_rows = rows.shape[0]
    for begin in range(0, n_columns, _DEPTH):
        end = min(begin + _DEPTH, n_columns)
        for r in range(0, n_rows, 2):
            other = min(r + 1, n_rows - 1)  # the last row alone is added up twice, and stored once
            at = panel[begin].ctypes.data
            first, second = load_floats(sums[r].ctypes.data), load_floats(sums[other].ctypes.data)
            for k in range(begin, end):
                values = load_floats(at)
                first = add(first, multiply(fill(rows[r, k]), values))
                second = add(second, multiply(fill(rows[other, k]), values))
                at += 4 * N_FLOATS
            store_floats(first, sums[r].ctypes.data)
            store_floats(second, sums[other].ctypes.data)


@compiled()
def feedback_round(in_steps, feedback, limit, errors, sums):  # type: ignore[no-untyped-def]
    n_rows, n_columns = in_steps.shape
    for p in range(feedback.shape[0]):
        begin = p * N_FLOATS
        sums[:] = 0
        _add_products(errors, begin, feedback[p], sums)
        for r in range(n_rows):
            at = sums[r].ctypes.data
            for k in range(begin, min(begin + N_FLOATS, n_columns)):
                exact = in_steps[r, k]
                code = np.rint(exact + sums[r, k - begin])
                error = exact - min(max(code, np.ceil(exact - limit)), np.floor(exact + limit))
                errors[r, k] = error
                store_floats(add(load_floats(at), multiply(fill(error), load_floats(feedback[p, k].ctypes.data))), at)


@compiled()
def square_products(rows, matrix, squares, sums):  # type: ignore[no-untyped-def]
    squares[:] = 0
    for p in range(matrix.shape[0]):
        sums[:] = 0
        _add_products(rows, rows.shape[1], matrix[p], sums)
        for r in range(rows.shape[0]):
            for j in range(N_FLOATS):
                squares[r] += np.float64(sums[r, j]) * np.float64(sums[r, j])
