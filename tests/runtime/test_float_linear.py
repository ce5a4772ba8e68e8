"""Linear layers that stay in 16 bits: the values of torch, from the kernel for few tokens and from torch for more."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from cuda_kernels.cpu import tensors
from int8convert.runtime.hastened.float_linear import FloatLinear, hasten, restore

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def n_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that the kernel got."""
    calls: list[int] = []
    kernel = tensors.float_linear
    monkeypatch.setattr(tensors, "float_linear", lambda x, *rest: calls.append(x.shape[0]) or kernel(x, *rest))
    return calls


def made(n_columns: int, n_rows: int, dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A layer, and its copy that is faster for few tokens."""
    torch.manual_seed(n_columns)
    layer = nn.Linear(n_columns, n_rows, bias).to(dtype).requires_grad_(False)
    fast = copy.deepcopy(layer)
    hasten(fast)
    return layer, fast


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_columns", [1, 31, 64, 65, 200, 4096])
@pytest.mark.parametrize("shape", [(1,), (2, 1), (2, 2), (0,), ()])
def test_few_tokens_are_as_near_to_exact_as_torchs(
    n_columns: int, shape: tuple[int, ...], bias: bool, dtype: torch.dtype, n_calls: list[int]
) -> None:
    layer, fast = made(n_columns, 133, dtype, bias)
    x = torch.randn(*shape, n_columns).to(dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    y = fast(x)
    assert n_calls == [x.numel() // n_columns] and y.dtype == dtype and y.shape == exact.shape
    # One rounding to 16 bits, and float32 sums of as many products as there are columns.
    sums = nn.functional.linear(x.double().abs(), layer.weight.double().abs()) + 1
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + sums * n_columns * 2.0**-23 + torch.finfo(dtype).tiny
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_depends_neither_on_its_batch_nor_on_the_threads(dtype: torch.dtype) -> None:
    _, fast = made(896, 3000, dtype)
    x = torch.randn(4, 896).to(dtype)
    batch, before = fast(x), torch.get_num_threads()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            assert torch.equal(torch.cat([fast(x[t : t + 1]) for t in range(4)]), batch)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_come_through(dtype: torch.dtype) -> None:
    layer, fast = made(70, 3, dtype)
    for value in (float("inf"), float("nan"), torch.finfo(dtype).max):
        x = torch.zeros(1, 70, dtype=dtype)
        x[0, 3] = value
        expected = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()).to(dtype)
        assert torch.equal(fast(x).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("case", ["many tokens", "float32", "gradient of x", "gradient of the weight", "meta", "vmap"])
def test_torch_runs_all_else(case: str, n_calls: list[int]) -> None:
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    layer, fast = made(64, 7, dtype)
    x = torch.randn(5 if case == "many tokens" else 1, 64).to(dtype)
    if case == "gradient of x":
        x.requires_grad_()
    elif case == "gradient of the weight":
        layer.requires_grad_(), fast.requires_grad_()
    elif case == "meta":
        x, layer, fast = x.to("meta"), layer.to("meta"), fast.to("meta")
    if case == "vmap":
        assert torch.equal(torch.vmap(fast)(x), torch.vmap(layer)(x))
    else:
        y = fast(x)
        assert y.requires_grad == layer(x).requires_grad and y.shape == (x.shape[0], 7)
        assert case == "meta" or torch.equal(y, layer(x))
    assert not n_calls


def test_wrong_widths_are_torchs_to_refuse(n_calls: list[int]) -> None:
    _, fast = made(64, 7, torch.bfloat16)
    with pytest.raises(RuntimeError):
        fast(torch.zeros(1, 63, dtype=torch.bfloat16))
    assert not n_calls


def test_a_compiled_layer_has_one_graph(n_calls: list[int]) -> None:
    layer, fast = made(64, 7, torch.bfloat16)
    x = torch.randn(1, 64).bfloat16()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x)) and not n_calls


def test_tied_weights_and_saved_names_stay() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model.head.weight = model.embedding.weight
    names = list(model.state_dict())
    hasten(model)
    assert type(model.head) is FloatLinear and model.head.weight is model.embedding.weight
    assert list(model.state_dict()) == names
    restore(model)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("how", ["pickle", "deep copy", "shallow copy"])
def test_a_copy_computes_with_its_own_weights(how: str, n_calls: list[int]) -> None:
    _, fast = made(64, 7, torch.bfloat16)
    copied = {
        "pickle": lambda: pickle.loads(pickle.dumps(fast)),
        "deep copy": lambda: copy.deepcopy(fast),
        "shallow copy": lambda: fast._replicate_for_data_parallel(),
    }[how]()
    copied.weight, copied.bias = nn.Parameter(torch.zeros_like(fast.weight), requires_grad=False), None
    assert torch.equal(copied(torch.ones(1, 64).bfloat16()), torch.zeros(1, 7)) and n_calls == [1]


def test_hooks_of_accelerate_stay(tmp_path: Path) -> None:
    model = nn.Sequential(*(made(64, 64, torch.bfloat16)[0] for _ in range(2)))
    x = torch.randn(1, 64).bfloat16()
    expected = model(x)
    places = {"0": "cpu", "1": "disk"}
    offloaded = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    hasten(offloaded)
    assert torch.equal(offloaded(x), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_no_columns_and_a_lost_bias_are_torchs(n_calls: list[int]) -> None:
    _, empty = made(0, 3, torch.bfloat16)
    assert torch.equal(empty(torch.ones(2, 0).bfloat16()), empty.bias.expand(2, 3))
    _, fast = made(64, 7, torch.bfloat16)
    fast.bias = nn.Parameter(fast.bias.to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="meta"):
        fast(torch.ones(1, 64).bfloat16())
    assert not n_calls


def test_autocast_decides_the_dtype() -> None:
    layer, fast = made(64, 7, torch.bfloat16)
    x = torch.randn(1, 64).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert fast(x).dtype == layer(x).dtype == torch.float16


def test_layer_is_exported_for_any_number_of_tokens() -> None:
    _, fast = made(64, 7, torch.bfloat16)
    n_tokens = torch.export.Dim("n_tokens", min=1, max=512)
    exported = torch.export.export(fast, (torch.ones(8, 64).bfloat16(),), dynamic_shapes=({0: n_tokens},))
    assert exported.module()(torch.ones(1, 64).bfloat16()).shape == (1, 7)
