"""The operations' torch wrappers on a GPU: sizes of real layers, and CUDA graphs. Skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from cuda_kernels.reference import QuantizedWeight
from tests.kernels.cuda_backends import Gpu, product_on_device
from tests.kernels.layers import assert_close, make_product

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 8, 9, 16, 32, 33, 64, 65, 512])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(4096, 4096), (1000, 4104), (4097, 1027)])
def test_products_of_real_layers_are_within_their_bound(n_tokens: int, n_rows: int, n_columns: int) -> None:
    product = make_product(n_tokens, n_rows, n_columns, "BF16", n_outliers=6, n_found=3, capacity=4)
    assert_close(product.multiply(Gpu()), product)


def test_a_token_s_output_does_not_depend_on_the_batch() -> None:
    from cuda_kernels.cuda.int8_matmul import int8_matmul

    product = make_product(512, 2048, 2048, "F16", n_outliers=6, n_found=3, capacity=4)
    x, weight = product_on_device(product.x, product.weight, "F16")
    whole = int8_matmul(x, weight)
    for size in (1, 2, 4, 8, 16, 64):
        part = x._replace(
            codes=x.codes[:size], absmax=x.absmax[:size], outlier_x=x.outlier_x[:size], found_x=x.found_x[:size]
        )
        assert torch.equal(int8_matmul(part, weight), whole[:size])


@pytest.mark.parametrize("capacity", [0, 16])
@pytest.mark.parametrize("n_tokens", [1, 8, 16, 512])
def test_a_captured_layer_gives_the_same_bits_when_replayed(n_tokens: int, capacity: int) -> None:
    """Replayed on other tokens than were there at the capture, and twice."""
    from cuda_kernels.cuda.activation_quantize import activation_quantize
    from cuda_kernels.cuda.int8_matmul import int8_matmul

    torch.manual_seed(0)
    columns = torch.tensor([3, 77, 1000], dtype=torch.int32, device="cuda")
    weight_codes = torch.randint(-127, 128, (2048, 1024), dtype=torch.int8, device="cuda")
    absmax, outliers = torch.rand(2048, device="cuda"), torch.randn(2048, 3, device="cuda").half()
    weight = QuantizedWeight(weight_codes, absmax, outliers, torch.randn(2048, device="cuda").half())

    def layer(x: torch.Tensor) -> torch.Tensor:
        return int8_matmul(activation_quantize(x, columns, 6.0, capacity), weight)

    batches = [torch.randn(n_tokens, 1024, device="cuda").half() * 2 for _ in range(3)]
    expected = [layer(x) for x in batches]
    x = batches[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for batch, wanted in zip(batches, expected, strict=True):
        x.copy_(batch)
        for _ in range(2):
            graph.replay()
            assert torch.equal(y, wanted)


def test_nothing_waits_for_the_device() -> None:
    from cuda_kernels.cuda.activation_quantize import activation_quantize
    from cuda_kernels.cuda.int8_matmul import int8_matmul

    x = torch.randn(16, 512, device="cuda").half()
    columns = torch.tensor([1, 2], dtype=torch.int32, device="cuda")
    codes = torch.randint(-127, 128, (512, 512), dtype=torch.int8, device="cuda")
    outliers = torch.randn(512, 2, device="cuda").half()
    weight = QuantizedWeight(codes, torch.rand(512, device="cuda"), outliers, None)

    def layer() -> torch.Tensor:
        return int8_matmul(activation_quantize(x, columns, 6.0, 16), weight)

    layer()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
