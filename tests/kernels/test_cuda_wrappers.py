"""What the torch wrappers of the CUDA operations queue, asked of tensors on the CPU: nothing is launched here."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from cuda_kernels.cuda import activation_quantize, dequantize_epilogue, int8_matmul
from cuda_kernels.cuda.launch import Launch
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight


class Queue:
    """`launch.run`, which keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[Launch] = []
        for module in (activation_quantize, dequantize_epilogue, int8_matmul):
            monkeypatch.setattr(module, "run", self._run)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))

    def _run(self, launches: Iterable[Launch], _device: torch.device) -> None:
        for launch in launches:
            launch.kernel.arguments.pack(launch.args)
            self.launches.append(launch)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


def layer(
    n_tokens: int, dtype: torch.dtype = torch.float16
) -> tuple[QuantizedActivations[torch.Tensor], QuantizedWeight[torch.Tensor]]:
    """The operands of an int8 product, N = 24, K = 32, two outlier columns stored and room for three."""
    x = QuantizedActivations(
        torch.ones(n_tokens, 32, dtype=torch.int8),
        torch.ones(n_tokens, 1),
        torch.ones(n_tokens, 2, dtype=dtype),
        torch.full((3,), -1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(n_tokens, 3, dtype=dtype),
    )
    weight = QuantizedWeight(
        torch.ones(24, 32, dtype=torch.int8),
        torch.ones(24),
        torch.ones(24, 2, dtype=dtype),
        torch.ones(24, dtype=dtype),
    )
    return x, weight


@pytest.mark.parametrize(("n_tokens", "kernel"), [(1, "int8_gemv"), (9, "int8_skinny"), (65, "dequantize_epilogue")])
def test_product_queues_the_addresses_and_sizes_of_its_tensors(queue: Queue, n_tokens: int, kernel: str) -> None:
    x, weight = layer(n_tokens)
    y = int8_matmul.int8_matmul(x, weight)
    (launch,) = queue.launches
    assert launch.kernel.name == kernel
    first, *addresses, has_bias = launch.args[:12]
    assert first == x.codes.data_ptr() or kernel == "dequantize_epilogue"
    assert addresses == [each.data_ptr() for each in (*x[1:6], *weight, y)] and has_bias == 1
    assert launch.args[12:] == (n_tokens, 24, 32, 2, 3)
    assert y.shape == (n_tokens, 24) and y.dtype == torch.float16


def test_missing_bias_is_said_to_be_missing(queue: Queue) -> None:
    x, weight = layer(1)
    int8_matmul.int8_matmul(x, weight._replace(bias=None))
    assert queue.launches[0].args[9] == 0 and queue.launches[0].args[11] == 0


def test_epilogue_reads_the_products_it_is_given(queue: Queue) -> None:
    x, weight = layer(5, torch.bfloat16)
    products = torch.zeros(5, 24, dtype=torch.int32)
    y = dequantize_epilogue.dequantize_epilogue(products, x, weight)
    (launch,) = queue.launches
    assert launch.args[0] == products.data_ptr()
    assert launch.args[1:11] == tuple(each.data_ptr() for each in (*x[1:6], *weight, y))
    assert y.dtype == torch.bfloat16


def test_operands_apart_are_put_together_and_others_left_where_they_are(queue: Queue) -> None:
    x, weight = layer(1)
    weight = weight._replace(outlier_weight=torch.ones(24, 4, dtype=torch.float16)[:, ::2])
    int8_matmul.int8_matmul(x, weight)
    assert queue.launches[0].args[8] != weight.outlier_weight.data_ptr()
    assert queue.launches[0].args[6] == weight.codes.data_ptr()


@pytest.mark.parametrize(("n_tokens", "capacity", "kernels"), [
    (3, 0, ["activation_quantize"]),
    (3, 4, ["activation_quantize"]),
    (30, 4, ["mark_columns", "activation_quantize"]),
])  # fmt: skip
def test_quantizer_queues_the_addresses_and_sizes_of_its_tensors(
    queue: Queue, n_tokens: int, capacity: int, kernels: list[str]
) -> None:
    x = torch.ones(n_tokens, 100, dtype=torch.bfloat16)[:, :64]
    columns = torch.tensor([1, 5], dtype=torch.int32)
    results = activation_quantize.activation_quantize(x, columns, 6.0, capacity)
    assert [launch.kernel.name for launch in queue.launches] == kernels
    args = queue.launches[-1].args
    assert args[:2] == (x.data_ptr(), columns.data_ptr())
    assert args[3:9] == tuple(each.data_ptr() for each in results[:6])
    assert args[9:15] == (0x40C00000, n_tokens, 64, 100, 2, capacity), "6.0 as bits, then M, K, row stride, n, capacity"
    dtypes = [each.dtype for each in results[:6]]
    assert dtypes == [torch.int8, torch.float32, torch.bfloat16, torch.int32, torch.int32, torch.bfloat16]
    assert [tuple(each.shape) for each in results[:6]] == [
        (n_tokens, 64), (n_tokens, 1), (n_tokens, 2), (capacity,), (1,), (n_tokens, capacity)
    ]  # fmt: skip


def test_no_tokens_queue_no_product(queue: Queue) -> None:
    assert int8_matmul.int8_matmul(*layer(0)).shape == (0, 24)
    assert not queue.launches
