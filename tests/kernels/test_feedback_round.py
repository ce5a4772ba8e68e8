"""Rounding with feedback: the reference against GPTQ as its paper has it, the CPU kernel against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cuda_kernels import cpu, reference

Matrix = npt.NDArray[np.float64]


def inputs(n_columns: int, n_tokens: int, seed: int = 0) -> Matrix:
    """Inputs [tokens, columns] that go together, some columns much larger than others; another seed, other tokens."""
    generator = np.random.default_rng(99)
    mixing = generator.standard_normal((n_columns, n_columns)) * np.exp(generator.standard_normal(n_columns))
    return np.random.default_rng(seed).standard_normal((n_tokens, n_columns)) @ mixing


def gptq_errors(in_steps: Matrix, h: Matrix, limit: float = np.inf) -> Matrix:
    """GPTQ (arXiv:2210.17323, Alg. 1) without blocks: the upper Cholesky factor of H^-1, column by column.

    The limit is ours: codes stay that near to their weights.
    """
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    weight, errors = in_steps.copy(), np.zeros_like(in_steps)
    for k in range(len(h)):
        codes = np.clip(np.rint(weight[:, k]), np.ceil(in_steps[:, k] - limit), np.floor(in_steps[:, k] + limit))
        errors[:, k] = in_steps[:, k] - codes
        weight[:, k:] -= np.outer((weight[:, k] - codes) / factor[k, k], factor[k, k:])
    return errors


def feedback_of(h: Matrix) -> Matrix:
    factor = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return factor / np.diag(factor)


@pytest.mark.parametrize("limit", [0.99, np.inf])
@pytest.mark.parametrize("n_columns", [1, 2, 7, 40, 130])
def test_reference_rounds_as_gptq_does(n_columns: int, limit: float) -> None:
    x = inputs(n_columns, 4 * n_columns)
    h = x.T @ x + 0.01 * np.mean(np.square(x).sum(axis=0)) * np.eye(n_columns)
    in_steps = np.random.default_rng(1).uniform(-127, 127, (20, n_columns))
    found = reference.feedback_round(in_steps, feedback_of(h), limit)
    np.testing.assert_allclose(found, gptq_errors(in_steps, h, limit), atol=1e-6)
    if n_columns > 2:
        nearest = in_steps - np.rint(in_steps)
        assert np.square(x @ found.T).sum() < 0.9 * np.square(x @ nearest.T).sum()


def exact_case(n_rows: int, n_columns: int) -> tuple[Any, Any]:
    """Weights and feedback whose sums float32 holds exactly, whatever their order."""
    generator = np.random.default_rng(n_rows + 100 * n_columns)
    in_steps = (generator.integers(-127 * 64, 127 * 64, (n_rows, n_columns)) / 64).astype(np.float32)
    return in_steps, (generator.integers(-8, 9, (n_columns, n_columns)) / 64).astype(np.float32)


@pytest.mark.parametrize("limit", [0.5, 0.99, 2.5])
@pytest.mark.parametrize("n_columns", [1, 31, 32, 33, 64, 200, 600])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 5])
def test_kernel_equals_reference(n_rows: int, n_columns: int, limit: float) -> None:
    in_steps, feedback = exact_case(n_rows, n_columns)
    errors = np.full_like(in_steps, np.nan)
    cpu.feedback_round(in_steps, cpu.panels(feedback), limit, errors)
    np.testing.assert_array_equal(errors, reference.feedback_round(in_steps, feedback, limit))
    assert (np.abs(errors) <= limit).all()


def test_half_a_step_is_rounding_to_nearest() -> None:
    in_steps, feedback = exact_case(3, 64)
    in_steps += np.float32(1 / 256)  # no ties
    np.testing.assert_array_equal(reference.feedback_round(in_steps, feedback, 0.5), in_steps - np.rint(in_steps))


@pytest.mark.parametrize(
    ("n_rows", "n_columns", "n_tokens"), [(0, 5, 3), (1, 1, 1), (3, 300, 31), (4, 257, 64), (2, 9, 0)]
)
def test_squared_products_are_those_of_numpy(n_rows: int, n_columns: int, n_tokens: int) -> None:
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((n_rows, n_columns)).astype(np.float32)
    matrix = generator.standard_normal((n_columns, n_tokens)).astype(np.float32)
    found = np.full(n_rows, np.nan)
    cpu.square_products(rows, cpu.panels(matrix), found)
    np.testing.assert_allclose(found, np.square(rows.astype(float) @ matrix.astype(float)).sum(axis=1), rtol=1e-5)
