"""The torch operators: what the reference says, traced, compiled, differentiated; and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_kernels import ops, reference, registration
from cuda_kernels.reference import QuantizedActivations, QuantizedWeight
from tests.kernels.backends import narrow, widen

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
STORED = [3, 50]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_layer(dtype: torch.dtype, n_rows: int = 37, n_columns: int = 130, bias: bool = True) -> dict[str, Any]:
    """Weight and rule of a layer as `int8_linear` takes them, and the weight they stand for."""
    generator = torch.Generator().manual_seed(n_rows)
    weight = (torch.randn(n_rows, n_columns, generator=generator) * 0.05).to(dtype)
    rows = ops.row_quantize(weight)
    return {
        "weight": QuantizedWeight(
            rows.codes,
            rows.absmax,
            weight[:, STORED].contiguous(),
            torch.randn(n_rows, generator=generator).to(dtype) if bias else None,
        ),
        "outlier_columns": torch.tensor(STORED, dtype=torch.int32),
        "threshold": 6.0,
        "capacity": 4,
    }


def flat_arguments(x: Tensor, layer: dict[str, Any]) -> tuple[Any, ...]:
    """Those of the operator `int8_linear`, whose schema knows no named tuples."""
    return x, *layer["weight"], layer["outlier_columns"], layer["threshold"], layer["capacity"]


def random_x(dtype: torch.dtype, *shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    x[..., STORED] *= 20
    x[..., 77] = 9 + x[..., 77].abs()
    return x.to(dtype)


def dequantized(layer: dict[str, Any]) -> Tensor:
    """float64 [N, K]: what the layer multiplies by, its stored outlier columns exact."""
    quantized: QuantizedWeight[Tensor] = layer["weight"]
    weight = quantized.codes.double() * quantized.absmax.double()[:, None] / reference.N_STEPS
    weight[:, layer["outlier_columns"].long()] = quantized.outlier_weight.double()
    return weight


def operands(dtype: torch.dtype) -> tuple[QuantizedActivations[Tensor], QuantizedWeight[Tensor]]:
    """What `int8_matmul` takes."""
    layer = random_layer(dtype)
    return ops.activation_quantize(random_x(dtype, 5, 130), layer["outlier_columns"], 6.0, 4), layer["weight"]


@every_dtype
def test_row_quantize_equals_the_reference(dtype: torch.dtype) -> None:
    weight = random_x(dtype, 200, 130)
    expected = reference.row_quantize(weight.float().numpy())
    codes, absmax, signal, noise = ops.row_quantize(weight)
    np.testing.assert_array_equal(codes.numpy(), expected.codes)
    np.testing.assert_array_equal(absmax.numpy(), expected.absmax)
    np.testing.assert_allclose(signal.numpy(), expected.signal, rtol=1e-4)
    np.testing.assert_allclose(noise.numpy(), expected.noise, rtol=1e-4)


@every_dtype
@pytest.mark.parametrize("shape", [(130,), (1, 130), (7, 130), (2, 3, 130), (2, 2, 2, 130)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_activation_quantize_then_int8_matmul(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer, x = random_layer(dtype, bias=bias), random_x(dtype, *shape)
    y = ops.int8_linear(x, **layer)
    quantized = ops.activation_quantize(x.reshape(-1, 130), layer["outlier_columns"], 6.0, 4)
    assert y.shape == (*shape[:-1], 37) and y.dtype == dtype
    assert torch.equal(y, ops.int8_matmul(quantized, layer["weight"]).reshape(y.shape))
    widened = reference.activation_quantize(x.reshape(-1, 130).float().numpy(), np.array(STORED), 6.0, 4)
    exact = reference.int8_matmul(
        widened,
        QuantizedWeight(
            *(
                None if each is None else (each.float() if each.is_floating_point() else each).numpy()
                for each in layer["weight"]
            )
        ),
    )
    rounded = widen(narrow(exact, NAMES[dtype]), NAMES[dtype])
    # test_int8_matmul holds the kernels to their bound; here a unit of the dtype is enough to tell right from wrong.
    torch.testing.assert_close(y.float().reshape(exact.shape), torch.from_numpy(rounded), rtol=2**-7, atol=1e-3)


@every_dtype
def test_layer_of_blocks_is_activation_quantize_then_int8_matmul(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), random_x(dtype, 2, 3, 130)
    quantized = ops.activation_quantize(x.reshape(-1, 130), layer["outlier_columns"], 6.0, 4, 64)
    assert quantized.absmax.shape == (6, 3) and quantized.block_size == 64
    y = ops.int8_linear(x, **layer, block_size=64)
    assert torch.equal(y.reshape(6, 37), ops.int8_matmul(quantized, layer["weight"]))
    assert not torch.equal(y, ops.int8_linear(x, **layer))
    products = torch.zeros(6, 37, dtype=torch.int32)
    with pytest.raises(ValueError, match="one scale a token, found a block size of 64"):
        ops.dequantize_epilogue(products, quantized, layer["weight"])
    for size in (32, 100, -64, 512):
        with pytest.raises(ValueError, match=f"expected a block size of 0, 64, 128, 256, found {size}"):
            ops.int8_linear(x, **layer, block_size=size)


@every_dtype
def test_epilogue_of_torchs_products_is_the_product(dtype: torch.dtype) -> None:
    x, weight = operands(dtype)
    products = (x.codes.int() @ weight.codes.int().T).int()
    assert torch.equal(ops.dequantize_epilogue(products, x, weight), ops.int8_matmul(x, weight))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "watch", ["nothing", "mode", "profiler", "negation", "gradient", "no gradient", "compile", "trace", "tangent"]
)
def test_operator_is_passed_by_only_where_nothing_watches(watch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, calls = random_layer(torch.float32), random_x(torch.float32, 2, 130), []
    expected = torch.ops.cuda_kernels.int8_linear(*flat_arguments(x, layer))
    run = ops.run_int8_linear
    monkeypatch.setattr(ops, "run_int8_linear", lambda *args: calls.append(args) or run(*args))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    if watch == "mode":
        with Mode():
            y = ops.int8_linear(x, **layer)
        assert "cuda_kernels.int8_linear.default" in seen
    elif watch == "compile":
        y = torch.compile(lambda x: ops.int8_linear(x, **layer), backend="eager", fullgraph=True)(x)
    elif watch == "trace":
        graph = make_fx(lambda x: ops.int8_linear(x, **layer))(x)
        assert "cuda_kernels.int8_linear" in graph.code
        y = graph(x)
    elif watch == "profiler":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = ops.int8_linear(x, **layer)
        assert "cuda_kernels::int8_linear" in {event.key for event in profile.key_averages()}
    elif watch == "negation":
        y = ops.int8_linear(torch._neg_view(-x), **layer)
    elif watch == "tangent":
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(ops.int8_linear(forward_ad.make_dual(x, x), **layer)).primal
    else:
        with torch.set_grad_enabled(watch == "gradient"):
            y = ops.int8_linear(x.clone().requires_grad_(watch != "nothing"), **layer)
        assert y.requires_grad == (watch == "gradient")
    assert torch.equal(y, expected) and bool(calls) == (watch in ("nothing", "no gradient"))


@pytest.mark.parametrize("shape", [(0, 130), (2, 0, 130)])
def test_no_tokens_give_no_outputs(shape: tuple[int, ...]) -> None:
    y = ops.int8_linear(random_x(torch.float16, 4, 130)[:0].reshape(shape), **random_layer(torch.float16))
    assert y.shape == (*shape[:-1], 37)


@every_dtype
def test_layout_of_x_changes_no_bit(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), random_x(dtype, 6, 130)
    y = ops.int8_linear(x, **layer)
    wide = torch.full((6, 300), float("nan"), dtype=dtype)
    wide[:, 9:139] = x
    assert torch.equal(ops.int8_linear(wide[:, 9:139], **layer), y)
    assert torch.equal(ops.int8_linear(x.T.contiguous().T, **layer), y)
    assert torch.equal(
        ops.int8_linear(x.reshape(2, 3, 130).transpose(0, 1), **layer), y.reshape(2, 3, 37).transpose(0, 1)
    )
    expanded = x[:1].expand(6, 130)
    assert torch.equal(ops.int8_linear(expanded, **layer), y[:1].expand(6, 37))


@every_dtype
def test_outlier_columns_are_multiplied_in_16_bits(dtype: torch.dtype) -> None:
    """The layer against the unquantized one: error of int8 codes only, however large the outliers."""
    layer = random_layer(dtype)
    x = random_x(dtype, 9, 130)
    x[:, 3] *= 50
    exact = x.double() @ dequantized(layer).T + layer["weight"].bias.double()
    error = (ops.int8_linear(x, **layer).double() - exact).abs()
    rest = x.double().clone()
    rest[:, [*STORED, 77]] = 0
    half_steps = rest.abs().amax(1, keepdim=True) / 254 * dequantized(layer).abs().sum(1)
    half_unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-20}[dtype]
    assert (error <= half_steps * 1.01 + exact.abs() * half_unit + 1e-3).all()


@every_dtype
def test_operators_pass_torchs_own_checks(dtype: torch.dtype) -> None:
    layer, x, products = random_layer(dtype), random_x(dtype, 2, 3, 130), torch.zeros(5, 37, dtype=torch.int32)
    quantized, weight = operands(dtype)
    calls = {
        "row_quantize": (x[0],),
        "activation_quantize": (x[0], layer["outlier_columns"], 6.0, 4),
        "int8_matmul": (*quantized[:6], *weight),
        "dequantize_epilogue": (products, *quantized[:6], *weight),
        "int8_linear": flat_arguments(x, layer),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.cuda_kernels, name).default, arguments)


@every_dtype
def test_operators_of_blocks_pass_torchs_own_checks(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), random_x(dtype, 5, 130)
    quantized = ops.activation_quantize(x, layer["outlier_columns"], 6.0, 4, 64)
    calls = {
        "activation_quantize": (x, layer["outlier_columns"], 6.0, 4, 64),
        "int8_matmul": (*quantized[:6], *layer["weight"], 64),
        "int8_linear": (*flat_arguments(x, layer), 64),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.cuda_kernels, name).default, arguments)


def test_layer_passes_torchs_own_checks_of_its_gradient() -> None:
    layer = random_layer(torch.float32)
    for shape in ((2, 3, 130), (0, 130)):
        x = random_x(torch.float32, *shape).requires_grad_()
        torch.library.opcheck(torch.ops.cuda_kernels.int8_linear.default, flat_arguments(x, layer))


# torch's own compiler warns of torch's own deprecated names.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_compiles_without_a_break(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layer alone: what stands beside it would have inductor start a C++ compiler, half a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    layer = random_layer(torch.bfloat16)
    compiled = torch.compile(lambda x: ops.int8_linear(x, **layer), fullgraph=True, backend=backend, dynamic=True)
    for shape in ((2, 3, 130), (3, 5, 130)):
        x = random_x(torch.bfloat16, *shape)
        assert torch.equal(compiled(x), ops.int8_linear(x, **layer))


@every_dtype
def test_gradient_is_that_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    layer, x = random_layer(dtype), random_x(dtype, 2, 3, 130).requires_grad_()
    bias = layer["weight"].bias.requires_grad_()
    y = ops.int8_linear(x, **layer)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    y.backward(grad_y)
    weight = dequantized(layer)
    half_unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}[dtype]
    # The weight and the result are each rounded to the dtype; float32 sums of 37 terms are far below that or covered.
    magnitudes = grad_y.double().abs() @ weight.abs()
    assert ((x.grad.double() - grad_y.double() @ weight).abs() <= magnitudes * (2.1 * half_unit + 40 * 2**-24)).all()
    torch.testing.assert_close(
        bias.grad, grad_y.flatten(0, 1).double().sum(0).to(dtype), rtol=4 * half_unit, atol=half_unit
    )


def test_gradient_is_exact_in_stored_columns() -> None:
    layer, x = random_layer(torch.float32), random_x(torch.float32, 1, 130).requires_grad_()
    ops.int8_linear(x, **layer)[0, 11].backward()
    assert torch.equal(x.grad[0, STORED], layer["weight"].outlier_weight[11])


def test_adapters_below_and_around_train() -> None:
    """A low-rank adapter beside the layer and a Linear below it learn what another weight computes."""
    torch.manual_seed(0)
    layer = random_layer(torch.float32, bias=False)
    below, down, up = torch.eye(130), torch.randn(130, 2) * 0.1, torch.zeros(2, 37)
    parameters = [t.requires_grad_() for t in (below, down, up)]
    x, target = random_x(torch.float32, 64, 130), torch.randn(130, 37) * 0.05
    optimizer, losses = torch.optim.Adam(parameters, lr=3e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (ops.int8_linear(x @ below, **layer) + x @ down @ up - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_frozen_layer_keeps_no_gradient() -> None:
    x = random_x(torch.float32, 2, 130)
    assert not ops.int8_linear(x, **random_layer(torch.float32)).requires_grad


BAD = {
    "x": [
        (lambda t: t.double(), TypeError, "expected x to be float16, bfloat16 or float32, found torch.float64"),
        (lambda t: t[0, 0], ValueError, r"expected x to have at least one dimension, found \[\]"),
        (lambda t: t[:, :129], ValueError, r"expected weight_codes to be torch.int8 \[37, 129\]"),
        (lambda t: t.half(), ValueError, "expected outlier_weight to be torch.float16"),
    ],
    "weight_codes": [
        (lambda t: t.float(), ValueError, "expected weight_codes to be torch.int8 .* found torch.float32"),
        (lambda t: t.T.contiguous().T, ValueError, "expected weight_codes to be contiguous, found strides"),
        (lambda t: t[0], ValueError, "expected weight_codes to be"),
    ],
    "weight_absmax": [
        (lambda t: t[:-1], ValueError, r"expected weight_absmax to be torch.float32 \[37\] on cpu, found .* \[36\]"),
        (lambda t: t.double(), ValueError, "expected weight_absmax to be torch.float32"),
        (lambda t: t.to("meta"), ValueError, "on cpu, found torch.float32 .* on meta"),
    ],
    "outlier_columns": [
        (lambda t: t.long(), ValueError, r"expected outlier_columns to be torch.int32 \[2\]"),
        (lambda t: t[:1], ValueError, r"expected outlier_weight to be torch.float32 \[37, 1\]"),
        (lambda t: t[None], ValueError, "expected outlier_columns to be"),
        (lambda t: t.flip(0), ValueError, r"expected ascending outlier columns below 130, found \[50, 3\]"),
        (lambda t: t * 0, ValueError, r"expected ascending outlier columns below 130, found \[0, 0\]"),
        (lambda t: t + 80, ValueError, r"expected ascending outlier columns below 130, found \[83, 130\]"),
        (lambda t: t - 4, ValueError, r"expected ascending outlier columns below 130, found \[-1, 46\]"),
    ],
    "outlier_weight": [(lambda t: t.T, ValueError, r"expected outlier_weight to be .* \[37, 2\] on cpu, found")],
    "bias": [(lambda t: t[1:], ValueError, r"expected bias to be torch.float32 \[37\] on cpu, found .* \[36\]")],
    "threshold": [
        (lambda t: 0.0, ValueError, "expected a positive threshold, found 0.0"),
        (lambda t: float("nan"), ValueError, "expected a positive threshold, found nan"),
    ],
    "capacity": [(lambda t: -1, ValueError, "expected a capacity of at least 0, found -1")],
}


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [pytest.param(name, *case, id=f"{name}-{i}") for name, cases in BAD.items() for i, case in enumerate(cases)],
)
def test_what_the_kernels_would_misread_is_refused(argument: str, change: Any, error: Any, message: str) -> None:
    arguments = {"x": random_x(torch.float32, 3, 130), **random_layer(torch.float32)}
    if argument in arguments:
        arguments[argument] = change(arguments[argument])
    else:
        weight, field = arguments["weight"], argument.removeprefix("weight_")
        arguments["weight"] = weight._replace(**{field: change(getattr(weight, field))})
    with pytest.raises(error, match=message):
        ops.int8_linear(**arguments)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t[:, :-1], r"expected codes to be torch.int8 \[5, 130\] on cpu, found"),
        (1, lambda t: t[1:], "expected x_absmax to be"),
        (2, lambda t: t[:, 1:], r"expected outlier_weight to be torch.float32 \[37, 1\]"),
        (3, lambda t: t.long(), "expected found_columns to be torch.int32"),
        (4, lambda t: t.repeat(2), r"expected n_found to be torch.int32 \[1\]"),
        (5, lambda t: t[:, 1:], r"expected found_x to be torch.float32 \[5, 4\]"),
        (3, lambda t: t + 60, r"expected found columns below 130, found \[137\], n_found 1"),
        (3, lambda t: t - 80, r"expected found columns below 130, found \[-3\], n_found 1"),
        (4, lambda t: t - 2, r"expected found columns below 130, found \[\], n_found -1"),
        (4, lambda t: t + 1, r"expected found columns below 130, found \[77, -1\], n_found 2"),
    ],
)
def test_product_refuses_what_is_not_quantized_activations(position: int, change: Any, message: str) -> None:
    x, weight = operands(torch.float32)
    changed = [change(each) if i == position else each for i, each in enumerate(x)]
    with pytest.raises(ValueError, match=message):
        ops.int8_matmul(QuantizedActivations(*changed), weight)


def test_too_many_input_features_are_refused() -> None:
    """One column more and a sum of int8 products may not fit int32."""
    weight = QuantizedWeight(torch.zeros(1, 133_145, dtype=torch.int8), torch.ones(1), torch.empty(1, 0), None)
    with pytest.raises(ValueError, match="expected at most 133144 input features, found 133145"):
        ops.int8_linear(torch.zeros(1, 133_145), weight, torch.empty(0, dtype=torch.int32), 6.0, 0)


def test_every_operation_has_its_function_on_both_devices() -> None:
    for operation in ("row_quantize", "activation_quantize", "int8_matmul", "dequantize_epilogue"):
        assert registration._kernel(operation, "cuda").__module__ == f"cuda_kernels.cuda.{operation}"
        assert registration._kernel(operation, "cpu").__module__ == "cuda_kernels.cpu.tensors"


def test_importing_the_package_registers_nothing() -> None:
    code = "import sys, cuda_kernels; print('torch' in sys.modules, 'numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
