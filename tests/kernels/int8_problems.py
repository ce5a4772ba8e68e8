"""Random int8 products, their exact answer, and how far from it a kernel may be."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cuda_kernels import reference
from cuda_kernels.reference import QuantizedActivations
from tests.kernels.backends import Bits, narrow, widen

ROUNDOFF = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24}
SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}
"""The smallest positive value of each dtype."""


class Problem(NamedTuple):
    """The arguments of `int8_matmul`, floats as bits of `dtype`."""

    x: QuantizedActivations
    dtype: str
    weight_codes: npt.NDArray[np.int8]
    weight_absmax: npt.NDArray[np.float32]
    outlier_weight: Bits
    bias: Bits | None


def problem(
    shape: tuple[int, int, int],
    dtype: str = "F16",
    n: int = 3,
    capacity: int = 2,
    n_found: int = 1,
    has_bias: bool = True,
    seed: int = 0,
) -> Problem:
    """All-different values; outliers of magnitude 50, so that one too many or too few is far outside every bound."""
    (M, N, K), random = shape, np.random.default_rng([seed, *shape, n, capacity, n_found])
    n = min(n, K)
    n_found = min(n_found, K - n)
    n_taken = min(n_found, capacity)
    chosen = random.permutation(K)[: n + n_taken]
    stored, found = np.sort(chosen[:n]), np.sort(chosen[n:])
    codes = random.integers(-127, 128, (M, K), dtype=np.int8)
    codes[:, chosen] = 0
    found_columns = np.full(capacity, -1, np.int32)
    found_columns[:n_taken] = found
    found_x = np.zeros((M, capacity))
    found_x[:, :n_taken] = random.normal(50, 20, (M, n_taken))
    x = QuantizedActivations(
        codes,
        random.uniform(0.5, 6, M).astype(np.float32),
        narrow(random.normal(50, 20, (M, n)), dtype),
        found_columns,
        np.array([n_found], np.int32),
        narrow(found_x, dtype),
    )
    return Problem(
        x,
        dtype,
        random.integers(-127, 128, (N, K), dtype=np.int8),
        random.uniform(0.01, 0.1, N).astype(np.float32),
        narrow(random.normal(0, 0.05, (N, n)), dtype),
        narrow(random.normal(0, 1, N), dtype) if has_bias else None,
    )


def widened(p: Problem) -> tuple[Any, ...]:
    """The arguments of `reference.int8_matmul`."""
    x = p.x._replace(outlier_x=widen(p.x.outlier_x, p.dtype), found_x=widen(p.x.found_x, p.dtype))
    bias = None if p.bias is None else widen(p.bias, p.dtype)
    return x, p.weight_codes, p.weight_absmax, widen(p.outlier_weight, p.dtype), bias


def assert_within_bound(y: Bits, p: Problem) -> None:
    """The kernel rounds, in units of u = 2^-24 of what it rounds: the integer sum (1), x_scale (2), their product (1),
    weight_scale (2), and the fma that adds it to the rest (1); each outlier term once when it is added, a found weight
    3 times before; the bias once when it is added; and in the end to the dtype, at most half its step. First order, so
    one more u for the rest. Relative to the sum of all magnitudes, which is what no partial sum exceeds."""
    exact = reference.int8_matmul(*widened(p))
    x, weight_codes, weight_absmax, outlier_weight, bias = widened(p)
    magnitudes = reference.int8_matmul(
        x._replace(codes=np.abs(x.codes), outlier_x=np.abs(x.outlier_x), found_x=np.abs(x.found_x)),
        np.abs(weight_codes),
        weight_absmax,
        np.abs(outlier_weight),
        None if bias is None else np.abs(bias),
    )
    n_rounded = 7 + (x.outlier_x.shape[1] + x.found_x.shape[1]) + 3 + 1 + 1
    bound = n_rounded * 2.0**-24 * magnitudes
    bound += ROUNDOFF[p.dtype] * (np.abs(exact) + bound) + SMALLEST[p.dtype]
    error = np.abs(widen(y, p.dtype).astype(np.float64) - exact)
    assert (error <= bound).all(), f"{np.nanmax(error / bound)} times the bound"
