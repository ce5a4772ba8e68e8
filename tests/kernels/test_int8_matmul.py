"""Every backend's decomposed product, with its epilogue alone beside it, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cuda_kernels import reference
from cuda_kernels.reference import N_STEPS, QuantizedActivations, QuantizedWeight
from tests.kernels.backends import DTYPES, Backend, Bits, backends, narrow, widen
from tests.kernels.layers import Product, assert_close, make_product, make_tokens, without_bias

SIZES = [1, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1025]

every_product = pytest.mark.parametrize("backend", backends("int8_matmul"))
every_epilogue = pytest.mark.parametrize("backend", backends("dequantize_epilogue"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def count_in_steps(codes: np.ndarray, weight_codes: np.ndarray, dtype: str = "F32") -> Product:
    """A product of these codes whose scales are all 1: y is the integer sum itself, rounded to the dtype."""
    (n_tokens, _), n_rows = codes.shape, weight_codes.shape[0]
    none, n_found = narrow(np.empty((n_tokens, 0)), dtype), np.zeros(1, np.int32)
    absmax = np.full((n_tokens, 1), N_STEPS, np.float32)
    x = QuantizedActivations(codes, absmax, none, np.empty(0, np.int32), n_found, none)
    weight_absmax = np.full(n_rows, N_STEPS, np.float32)
    return Product(dtype, x, QuantizedWeight(weight_codes, weight_absmax, narrow(np.empty((n_rows, 0)), dtype), None))


@every_product
@pytest.mark.parametrize("n_columns", SIZES)
def test_integer_sums_are_exact_at_every_size(backend: Backend, n_columns: int) -> None:
    """Up to 1,040 columns float32 holds every such sum exactly."""
    rng = np.random.default_rng(n_columns)
    for n_tokens, n_rows in ((1, 67), (2, 33), (5, 31), (33, 4)):
        codes = rng.integers(-127, 128, (n_tokens, n_columns), dtype=np.int8)
        weight_codes = rng.integers(-127, 128, (n_rows, n_columns), dtype=np.int8)
        y = widen(count_in_steps(codes, weight_codes).multiply(backend), "F32")
        np.testing.assert_array_equal(y, codes.astype(np.int64) @ weight_codes.T.astype(np.int64))


@every_product
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_codes_sum_up_without_overflow(backend: Backend, sign: int) -> None:
    """133,144 columns of +-127: one more and int32 would wrap around."""
    for n_tokens in (1, 2):
        codes = np.full((n_tokens, 133_144), 127, np.int8)
        weight_codes = np.full((2, 133_144), 127 * sign, np.int8)
        weight_codes[1, ::2] *= -1
        y = widen(count_in_steps(codes, weight_codes).multiply(backend), "F32")
        np.testing.assert_array_equal(y, [[np.float32(sign * 133_144 * 127**2), 0]] * n_tokens)


@every_product
@every_dtype
@pytest.mark.parametrize("n_columns", SIZES)
def test_product_is_within_its_bound_at_every_size(backend: Backend, dtype: str, n_columns: int) -> None:
    n_outliers, n_found = min(3, n_columns // 2), min(2, n_columns // 3)
    for n_tokens, n_rows in ((1, 33), (5, 31)):
        product = make_product(n_tokens, n_rows, n_columns, dtype, n_outliers, n_found, capacity=4)
        assert_close(product.multiply(backend), product)


BLOCKS = [("F16", 64), ("BF16", 128), ("F32", 256)]
every_block_size = pytest.mark.parametrize(("dtype", "block_size"), BLOCKS)


@every_product
@every_block_size
@pytest.mark.parametrize("n_columns", [1, 257, 1024])
def test_product_of_blocks_is_within_its_bound(backend: Backend, dtype: str, block_size: int, n_columns: int) -> None:
    n_outliers, n_found = min(3, n_columns // 2), min(2, n_columns // 3)
    for n_tokens, n_rows in ((1, 33), (17, 31)):
        product = make_product(n_tokens, n_rows, n_columns, dtype, n_outliers, n_found, 4, block_size)
        assert_close(product.multiply(backend), product)


@every_product
@every_block_size
def test_block_that_is_not_finite_spoils_its_token_alone(backend: Backend, dtype: str, block_size: int) -> None:
    product = make_product(5, 37, 300, dtype, block_size=block_size)
    product.x.codes[3, block_size : 2 * block_size], product.x.absmax[3, 1] = 0, np.inf
    assert not np.isfinite(widen(product.multiply(backend), dtype)[3]).any()
    assert_close(product.multiply(backend), product)


@every_product
@every_block_size
def test_bits_of_a_token_do_not_depend_on_its_batch(backend: Backend, dtype: str, block_size: int) -> None:
    product = make_product(33, 70, 1024, dtype, block_size=block_size)
    y = product.multiply(backend)
    for tokens in (slice(0, 1), slice(7, 8), slice(20, 33)):
        names = ("codes", "absmax", "outlier_x", "found_x")
        x = product.x._replace(**{name: getattr(product.x, name)[tokens] for name in names})
        np.testing.assert_array_equal(replace(product, x=x).multiply(backend), y[tokens])


@every_product
@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_product_is_within_its_bound_for_every_number_of_tokens_and_rows(
    backend: Backend, dtype: str, size: int
) -> None:
    for n_tokens, n_rows in ((size, 5), (3, size)):
        product = make_product(n_tokens, n_rows, 70, dtype, n_outliers=6)
        assert_close(product.multiply(backend), product)


@every_epilogue
@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_epilogue_is_within_its_bound_at_every_size(backend: Backend, dtype: str, size: int) -> None:
    for n_tokens, n_rows in ((size, 7), (5, size)):
        product = make_product(n_tokens, n_rows, 70, dtype, n_outliers=3, n_found=3, capacity=4)
        assert_close(product.finish(backend), product)


def multiply_by(operation: str) -> Callable[[Backend, Product], Bits]:
    return {"int8_matmul": lambda b, p: p.multiply(b), "dequantize_epilogue": lambda b, p: p.finish(b)}[operation]


both = pytest.mark.parametrize(
    ("backend", "multiply"),
    [
        pytest.param(*backend.values, multiply_by(operation), id=f"{operation}-{backend.id}", marks=backend.marks)
        for operation in ("int8_matmul", "dequantize_epilogue")
        for backend in backends(operation)
    ],
)

BackendMultiply = Callable[[Backend, Product], Bits]


@both
@every_dtype
@pytest.mark.parametrize(("n_stored", "n_found"), [(0, 0), (1, 0), (0, 1), (70, 0), (0, 70), (33, 37)])
def test_any_number_of_outlier_columns(
    backend: Backend, multiply: BackendMultiply, dtype: str, n_stored: int, n_found: int
) -> None:
    product = make_product(5, 37, 70, dtype, n_stored, n_found, capacity=n_found)
    assert_close(multiply(backend, product), product)


@both
@every_dtype
def test_columns_past_the_list_count_as_codes(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    product = make_product(5, 37, 70, dtype, n_outliers=2, n_found=6, capacity=3)
    assert product.x.n_found[0] == 6
    assert_close(multiply(backend, product), product)


@both
@every_dtype
def test_unused_places_of_the_list_are_not_read(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    """Neither as an activation nor as a column index."""
    product = make_product(3, 33, 70, dtype, n_outliers=1, n_found=2, capacity=6)
    found_x, found_columns = product.x.found_x.copy(), product.x.found_columns.copy()
    found_x[:, 2:] = narrow(float("nan"), dtype)
    found_columns[2:] = np.iinfo(np.int32).max
    spoilt = replace(product, x=product.x._replace(found_x=found_x, found_columns=found_columns))
    np.testing.assert_array_equal(multiply(backend, spoilt), multiply(backend, product))


@both
@every_dtype
def test_bias_may_be_missing(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    product = make_product(5, 37, 70, dtype, n_outliers=2)
    without = without_bias(product)
    assert_close(multiply(backend, without), without)
    assert (multiply(backend, without) != multiply(backend, product)).any()


@both
@every_dtype
def test_a_weight_row_of_zeros_gives_the_bias(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    product = make_product(5, 37, 70, dtype)
    product.weight.codes[9], product.weight.absmax[9] = 0, 0
    y = multiply(backend, product)
    np.testing.assert_array_equal(widen(y[:, 9], dtype), widen(product.weight.bias[9:10], dtype).repeat(5))


@both
@every_dtype
def test_a_token_of_zeros_gives_the_bias(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    product = make_product(5, 37, 70, dtype, n_outliers=2)
    product.x.codes[3], product.x.absmax[3], product.x.outlier_x[3] = 0, 0, 0
    np.testing.assert_array_equal(widen(multiply(backend, product)[3], dtype), widen(product.weight.bias, dtype))


@both
@every_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.uint32(0x7FFF_FFFF).view(np.float32)], ids=str)
def test_a_token_that_is_not_finite_spoils_its_row_alone(
    backend: Backend, multiply: BackendMultiply, dtype: str, bad: float
) -> None:
    product = make_product(5, 37, 70, dtype, n_outliers=2)
    product.x.codes[3], product.x.absmax[3] = 0, bad
    y = widen(multiply(backend, product), dtype)
    assert not np.isfinite(y[3]).any()
    assert_close(multiply(backend, product), product)


@both
def test_too_large_becomes_infinite(backend: Backend, multiply: BackendMultiply) -> None:
    product = make_product(3, 33, 70, "F16")
    product.weight.absmax[:] *= 1e5
    y = widen(multiply(backend, product), "F16")
    assert np.isinf(y).any() and not np.isnan(y).any()
    assert_close(multiply(backend, product), product)


@both
@pytest.mark.parametrize(
    ("dtype", "step", "sums"),
    [("F16", 16, {17: 2048, 18: 2050, 19: 2052, 21: 2052}), ("BF16", 2, {3: 256, 4: 258, 5: 260, 7: 260})],
)
def test_ties_go_to_even(
    backend: Backend, multiply: BackendMultiply, dtype: str, step: int, sums: dict[int, float]
) -> None:
    """127 * 16 + 17 = 2049 lies between the fp16 values 2048 and 2050, 127 * 2 + 3 = 257 between 256 and 258."""
    codes = np.array([[127, last] for last in sums], np.int8)
    y = multiply(backend, count_in_steps(codes, np.array([[step, 1], [-step, -1]], np.int8), dtype))
    np.testing.assert_array_equal(widen(y, dtype), [[rounded, -rounded] for rounded in sums.values()])


@both
@every_dtype
def test_no_tokens_give_no_outputs(backend: Backend, multiply: BackendMultiply, dtype: str) -> None:
    assert multiply(backend, make_product(0, 37, 70, dtype, n_outliers=2)).shape == (0, 37)


@both
def test_two_runs_agree_in_every_bit(backend: Backend, multiply: BackendMultiply) -> None:
    product = make_product(33, 129, 257, "F16", n_outliers=5, n_found=2, capacity=4)
    np.testing.assert_array_equal(multiply(backend, product), multiply(backend, product))


@both
@pytest.mark.parametrize("n_outliers", [6, 40])
def test_outlier_part_is_as_exact_as_torch(backend: Backend, multiply: BackendMultiply, n_outliers: int) -> None:
    """Root mean square error against float64 at most twice that of torch's own float32 product."""
    product = make_product(64, 65, 70, "F32", n_outliers)
    product.x.codes[:] = 0
    product = without_bias(product)
    x, weight = widen(product.x.outlier_x, "F32"), widen(product.weight.outlier_weight, "F32")
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    error, torch_error = (
        np.sqrt(np.square(y - exact).mean())
        for y in (widen(multiply(backend, product), "F32"), (torch.from_numpy(x) @ torch.from_numpy(weight).T).numpy())
    )
    assert error <= 2 * torch_error


@every_product
def test_outlier_columns_count_once(backend: Backend) -> None:
    """Exactly representable all through: quantized part and outlier part together are x @ W.T."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (33, 70)).astype(np.float32)
    weight[:, 0] = N_STEPS
    x = rng.integers(-5, 6, (9, 70)).astype(np.float32)
    x[:, [7, 50, 69]] *= 100
    x[:, 1] = 127
    stored = np.array([7, 69], np.int32)
    rows = reference.row_quantize(weight)
    quantized = reference.activation_quantize(x, stored, 200.0, 4)
    assert list(quantized.found_columns) == [50, -1, -1, -1]
    side = [np.ascontiguousarray(narrow(a, "F32")) for a in (quantized.outlier_x, quantized.found_x, weight[:, stored])]
    bits = quantized._replace(outlier_x=side[0], found_x=side[1])
    product = Product("F32", bits, QuantizedWeight(rows.codes, rows.absmax, side[2], None))
    np.testing.assert_array_equal(widen(product.multiply(backend), "F32"), x @ weight.T)


@every_product
def test_reordering_rows_and_tokens_reorders_outputs(backend: Backend) -> None:
    product = make_product(33, 70, 129, "BF16", n_outliers=3, n_found=1, capacity=1)
    rng = np.random.default_rng(1)
    rows, tokens = rng.permutation(70), rng.permutation(33)
    x = product.x
    reordered = Product(
        "BF16",
        x._replace(
            codes=x.codes[tokens],
            absmax=x.absmax[tokens],
            outlier_x=x.outlier_x[tokens],
            found_x=x.found_x[tokens],
        ),
        QuantizedWeight(*(each[rows] for each in product.weight)),
    )
    np.testing.assert_array_equal(reordered.multiply(backend), product.multiply(backend)[tokens][:, rows])


def test_reference_is_the_linear_layer_it_stands_for() -> None:
    """Half a step of each activation and each weight, and nothing more: outlier columns add no error."""
    x = widen(make_tokens(20, 200, "F32", [3, 180]), "F32")
    weight = np.random.default_rng(3).standard_normal((50, 200)).astype(np.float32) * 0.05
    stored = np.array([3, 180], np.int32)
    rows, quantized = reference.row_quantize(weight), reference.activation_quantize(x, stored, 6.0, 0)
    y = reference.int8_matmul(quantized, QuantizedWeight(rows.codes, rows.absmax, weight[:, stored], None))
    rest, rest_weight = (np.delete(a, stored, axis=1).astype(np.float64) for a in (x, weight))
    steps = quantized.absmax / N_STEPS, rows.absmax[None] / N_STEPS
    bound = np.abs(rest).sum(1)[:, None] * steps[1] / 2 + np.abs(rest_weight).sum(1) * steps[0] / 2
    bound += rest.shape[1] * steps[0] * steps[1] / 4
    error = np.abs(y - x.astype(np.float64) @ weight.T.astype(np.float64))
    assert (error <= bound * 1.001).all()
    assert error.max() > bound.max() / 100
