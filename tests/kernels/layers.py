"""Quantized activations and weights for the tests of products, the exact result of each, and how far off it may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cuda_kernels import reference
from cuda_kernels.reference import QuantizedWeight
from tests.kernels.backends import Backend, Reference, narrow, widen
from tests.kernels.outputs import Activations, Bits, Weight

Floats = npt.NDArray[np.float64]

UNIT = 2.0**-24
"""What one float32 operation may be off by, relative to its result."""


def make_tokens(n_tokens: int, n_columns: int, dtype: str, outliers: list[int], seed: int = 0) -> Bits:
    """Random activations, all different, below 6 but in the outlier columns, where every value is above it."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.standard_normal((n_tokens, n_columns)), -5, 5)
    sign = np.where(rng.random((n_tokens, len(outliers))) < 0.5, -1, 1)
    x[:, outliers] = sign * rng.uniform(7, 60, (n_tokens, len(outliers)))
    return narrow(x, dtype)


@dataclass(frozen=True)
class Product:
    """The operands of one decomposed product, floats as bits of `dtype`."""

    dtype: str
    x: Activations
    weight: Weight

    @cached_property
    def products(self) -> npt.NDArray[np.int64]:
        """int64 [blocks, M, N]."""
        return reference.block_products(self.x, self.weight)

    def widened(self) -> tuple[Activations, Weight]:
        """As the reference takes them: floats as float32."""
        x = self.x._replace(outlier_x=widen(self.x.outlier_x, self.dtype), found_x=widen(self.x.found_x, self.dtype))
        bias = None if self.weight.bias is None else widen(self.weight.bias, self.dtype)
        return x, self.weight._replace(outlier_weight=widen(self.weight.outlier_weight, self.dtype), bias=bias)

    def exact(self) -> Floats:
        return reference.dequantize_epilogue(self.products, *self.widened())

    def error(self) -> Floats:
        """How far a sum of these terms in float32, in any order, may be from the exact one.

        Every term takes at most 5 roundings: a product two scales, itself and two multiplications, a found column
        one scale and two multiplications. Adding up T terms rounds at most T - 1 times, each by a unit of a partial
        sum that is at most the sum of all magnitudes, and two units more cover the products of these errors. Results
        below the normal range may be taken for zero.
        """
        x, weight = self.widened()
        positive = x._replace(outlier_x=np.abs(x.outlier_x), found_x=np.abs(x.found_x))
        positive_weight = weight._replace(codes=np.abs(weight.codes), outlier_weight=np.abs(weight.outlier_weight))
        magnitudes = reference.dequantize_epilogue(np.abs(self.products), positive, positive_weight)
        magnitudes += 0 if weight.bias is None else 2 * np.abs(weight.bias.astype(np.float64))
        n_terms = 1 + x.absmax.shape[1] + x.outlier_x.shape[1] + x.found_x.shape[1]
        return (5 + n_terms - 1 + 2) * UNIT * magnitudes + (n_terms + 3) * 2.0**-126

    def multiply(self, backend: Backend) -> Bits:
        return backend.int8_matmul(self.x, self.weight, self.dtype)

    def finish(self, backend: Backend) -> Bits:
        return backend.dequantize_epilogue(self.products[0].astype(np.int32), self.x, self.weight, self.dtype)


def make_product(
    n_tokens: int,
    n_rows: int,
    n_columns: int,
    dtype: str,
    n_outliers: int = 0,
    n_found: int = 0,
    capacity: int = 0,
    block_size: int = 0,
) -> Product:
    """Random operands, all different; the stored outlier columns in the weight's codes are wrong on purpose.

    No activation code meets them, so whoever uses them shows.
    """
    rng = np.random.default_rng(n_tokens + n_rows + n_columns)
    columns = np.sort(rng.permutation(n_columns)[: n_outliers + n_found]).astype(np.int32)
    stored = np.sort(rng.permutation(columns)[:n_outliers])
    x = make_tokens(n_tokens, n_columns, dtype, list(columns), seed=n_columns)
    rule = (stored, reference.OUTLIER_THRESHOLD, capacity, block_size)
    quantized = Reference().activation_quantize(x, dtype, *rule)
    weight = QuantizedWeight(
        rng.integers(-127, 128, (n_rows, n_columns), dtype=np.int8),
        rng.uniform(0.01, 0.5, n_rows).astype(np.float32),
        narrow(rng.standard_normal((n_rows, n_outliers)) * 0.1, dtype),
        narrow(rng.standard_normal(n_rows), dtype),
    )
    return Product(dtype, quantized, weight)


def without_bias(product: Product) -> Product:
    return replace(product, weight=product.weight._replace(bias=None))


def assert_close(found: Bits, product: Product) -> None:
    """Between the roundings of the exact result less and plus its error: rounded once, to nearest; NaN where it is."""
    exact, error = product.exact(), product.error()
    y = widen(found, product.dtype)
    finite = np.isfinite(exact)
    assert y.shape == exact.shape
    assert not np.isfinite(y[~finite]).any(), "finite where the exact result is not"
    low = widen(narrow(exact - error, product.dtype), product.dtype)
    high = widen(narrow(exact + error, product.dtype), product.dtype)
    wrong = finite & ~((low <= y) & (y <= high))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} outside their bounds, the first at {np.argwhere(wrong)[0]}"
