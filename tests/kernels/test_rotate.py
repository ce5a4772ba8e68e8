"""Rotations by the regular Hadamard matrix: the reference against matrices, the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_kernels import cpu, reference

_FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2

each_size = pytest.mark.parametrize("size", [1, 4, 16, 64, 256])


def matrix_of(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(matrix, _FOUR)
    return matrix


def values(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows + columns).standard_normal((rows, columns)).astype(np.float32)


@each_size
def test_reference_multiplies_by_an_orthogonal_matrix_that_keeps_the_mean(size: int) -> None:
    expected = matrix_of(size)
    np.testing.assert_array_equal(reference.rotate(np.eye(size, dtype=np.float32), size), expected)
    np.testing.assert_array_equal(np.abs(expected), size**-0.5)
    np.testing.assert_allclose(expected @ expected, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(expected.sum(0), np.ones(size))
    x = values(3, 2 * size)
    blocks = x.reshape(3, 2, size).astype(np.float64) @ expected
    np.testing.assert_allclose(reference.rotate(x, size), blocks.reshape(3, -1), atol=1e-5)


@each_size
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_kernel_equals_reference_to_the_bit(size: int, n_blocks: int) -> None:
    columns, rows = values(5, n_blocks * size), values(n_blocks * size, 5)
    by_columns, by_rows = columns.copy(), rows.copy()
    cpu.rotate(by_columns, size)
    cpu.rotate(by_rows, size, axis=0)
    np.testing.assert_array_equal(by_columns, reference.rotate(columns, size))
    np.testing.assert_array_equal(by_rows.T, reference.rotate(np.ascontiguousarray(rows.T), size))
