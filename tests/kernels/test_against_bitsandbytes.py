"""Our rule beside bitsandbytes' own operators, where both rules pick the same row maxima.

They do where every value in an outlier column is an outlier: bitsandbytes takes the maximum over all values below the
threshold, and we over the columns that hold no outlier.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD
from tests.kernels.backends import Backend, backends, widen
from tests.kernels.layers import Product, make_product, make_tokens

THEIR_CONSTANT = 6.200124e-05
"""What bitsandbytes' CPU path multiplies by where 1 / 127^2 = 6.2000124e-05 is meant."""

NONE = np.empty(0, np.int32)
OUTLIERS = [5, 64, 100, 129]

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("backend", backends("activation_quantize"))
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_codes_absmax_and_columns_are_theirs(backend: Backend, dtype: str) -> None:
    x = make_tokens(33, 130, dtype, OUTLIERS)
    found = backend.activation_quantize(x, dtype, NONE, OUTLIER_THRESHOLD, 8)
    theirs = torch.from_numpy(x.view({"F16": np.float16, "F32": np.float32}[dtype]).copy())
    codes, absmax, columns = bitsandbytes.functional.int8_vectorwise_quant(theirs, threshold=OUTLIER_THRESHOLD)
    np.testing.assert_array_equal(found.codes, codes.numpy())
    np.testing.assert_array_equal(found.absmax[:, 0], absmax.numpy())
    np.testing.assert_array_equal(found.found_columns[: found.n_found[0]], columns.numpy())


@pytest.mark.parametrize("backend", backends("int8_matmul"))
def test_dynamic_product_is_theirs_but_for_their_constant(backend: Backend) -> None:
    """In float32, so that nothing hides behind the rounding of fp16. They, too, dequantize the outlier columns."""
    made = make_product(33, 37, 130, "F32", n_found=4, capacity=8)
    product = Product("F32", made.x, made.weight)
    x = widen(make_tokens(33, 130, "F32", list(made.x.found_columns[:4]), seed=130), "F32")
    ours = widen(product.multiply(backend), "F32")
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        *map(torch.from_numpy, (x, made.x.codes, made.weight.codes, made.x.absmax, made.weight.absmax)),
        torch.from_numpy(made.x.found_columns[:4]).long(),
        torch.from_numpy(widen(made.weight.bias, "F32")),
    )
    np.testing.assert_array_equal(x[:, made.x.found_columns[:4]], widen(made.x.found_x[:, :4], "F32"))
    scaled = made.products * made.x.absmax[:, None].astype(np.float64) * made.weight.absmax
    constant_error = np.abs(scaled) * abs(THEIR_CONSTANT - 1 / N_STEPS**2)
    assert (np.abs(ours - theirs.numpy()) <= constant_error + 3 * product.error()).all()
