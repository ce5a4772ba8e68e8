"""torch's own Transformer with int8 layers: every mask, layout and mode against the float modules.

The float model with the weights the codes stand for has to agree to float rounding, once the int8 layers round their
weights alone; and the float model itself to what quantizing costs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import int8convert
from int8convert.errors import NonFiniteWeightError
from int8convert.runtime.attention import Int8MultiheadAttention
from int8convert.runtime.linear import Int8Linear
from tests.runtime.float_twin import exact_products, float_twin, int8_names

EMBED, HEADS, N_TOKENS = 32, 4, 6
ROUNDING = 2e-5
"""Of float32 values of about one through two layers."""

QUANTIZING = 0.1
"""Of the same values: the largest error found is 0.061, where their spread is one."""

PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [True] + [False] * 5])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N_TOKENS)
WINDOW = torch.ones(N_TOKENS, N_TOKENS).triu(2).bool()

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "padding to the right": {"src_key_padding_mask": PADDING[1:2].expand(3, -1)},
    "float padding": {"src_key_padding_mask": PADDING.float() * -3},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "bool": {"src_mask": WINDOW},
    "of each head": {
        "src_mask": torch.randn(3 * HEADS, N_TOKENS, N_TOKENS, generator=torch.Generator().manual_seed(2))
    },
    "both": {"src_mask": WINDOW, "src_key_padding_mask": PADDING},
}


def randomized(model: nn.Module) -> Any:
    """Biases and norms too, which torch starts at 0 and 1, by which much would go unseen."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def encoder(batch_first: bool = True, norm_first: bool = False, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 64, dropout, batch_first=batch_first, norm_first=norm_first, **options
    )
    return randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first))


def tokens(batch_first: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    x = torch.randn(3, N_TOKENS, EMBED, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x if batch_first else x.transpose(0, 1)


def run(model: Any, x: torch.Tensor, grad: bool, **masks: Any) -> torch.Tensor:
    """An encoder's output; masks are for `nn.TransformerEncoder`."""
    masks = {"mask" if key == "src_mask" else key: value for key, value in masks.items()}
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the float model's nested tensors are a prototype, and say so
        result: torch.Tensor = model(x, **masks)
    return result


@contextmanager
def slow_path() -> Iterator[None]:
    """torch's fast path takes masks of floats for masks of bools, and makes NaN of one for each head."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def check_against_float(model: Any, int8_model: Any, call: Any, seen: Any = slice(None)) -> None:
    """call(model) -> outputs; of those only `seen` have a meaning."""
    with slow_path():
        expected, of_twin = call(model)[seen], call(float_twin(model, int8_model))[seen]
    with exact_products():
        assert (call(int8_model)[seen] - of_twin).abs().max() < ROUNDING
    error = (call(int8_model)[seen] - expected).abs().max()
    assert 0 < error < QUANTIZING


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_is_within_quantization_of_the_float_one(mask: str, batch_first: bool, norm_first: bool) -> None:
    """In training, with gradients, and in evaluation without, where torch would take its fast path."""
    model = encoder(batch_first, norm_first)
    masks = MASKS[mask]
    padding = masks.get("src_key_padding_mask", torch.zeros(3, N_TOKENS))
    seen = padding == 0 if batch_first else (padding == 0).t()
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    assert len(int8_names(int8_model)) == 12
    for training, grad in ((True, True), (False, False), (False, True)):
        model.train(training), int8_model.train(training)
        check_against_float(model, int8_model, lambda m, g=grad: run(m, tokens(batch_first), g, **masks), seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_encoder_in_16_bits(dtype: torch.dtype) -> None:
    model = encoder().to(dtype).eval()
    expected = run(model, tokens(dtype=dtype), False, **MASKS["both"]).float()
    int8convert.quantize_(model)
    y = run(model, tokens(dtype=dtype), False, **MASKS["both"])
    seen = ~PADDING
    assert y.dtype == dtype and (y[seen].float() - expected[seen]).abs().max() < QUANTIZING + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("skip", [["self_attn"], ["linear1", "linear2"], ["layers.0.*"]])
@pytest.mark.parametrize("mask", ["none", "padding", "padding to the right"])
def test_encoder_that_is_int8_in_part_leaves_the_fast_path(skip: list[str], mask: str) -> None:
    """It reads the weights of all layers inside, int8 or not."""
    model = encoder().eval()
    int8_model = int8convert.quantize_(copy.deepcopy(model), skip=skip)
    assert 0 < len(int8_names(int8_model)) < 12
    seen = ~MASKS[mask].get("src_key_padding_mask", torch.zeros(3, N_TOKENS)).bool()
    check_against_float(model, int8_model, lambda m: run(m, tokens(), False, **MASKS[mask]), seen)


def test_encoder_without_int8_layers_keeps_the_fast_path() -> None:
    model = nn.ModuleDict({"encoder": encoder(), "other": nn.Sequential(nn.Linear(32, 32))})
    int8convert.quantize_(model, skip=["encoder.*"])
    assert model["encoder"].use_nested_tensor and model["encoder"].layers[0].activation_relu_or_gelu == 1


@pytest.mark.parametrize("activation", ["gelu", nn.functional.silu])
def test_activation_is_still_the_layers_own(activation: Any) -> None:
    model = encoder(batch_first=False, activation=activation).eval()
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    check_against_float(model, int8_model, lambda m: run(m, tokens(False), False))


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    model = encoder(batch_first).eval()
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    x = tokens()[0]
    masks = {"src_key_padding_mask": PADDING[1], "src_mask": WINDOW}
    check_against_float(model, int8_model, lambda m: run(m, x, False, **masks), ~PADDING[1])
    of_each_head = MASKS["of each head"]["src_mask"][:HEADS]
    check_against_float(model, int8_model, lambda m: run(m, x, False, src_mask=of_each_head))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_decoder_with_every_mask(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, which this layout cannot have
        model = randomized(
            nn.Transformer(EMBED, HEADS, 2, 2, 64, 0.0, batch_first=batch_first, norm_first=norm_first).eval()
        )
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    assert len(int8_names(int8_model)) == 2 * 6 + 2 * 10
    source, target = (
        tokens(batch_first),
        tokens(batch_first, seed=2)[:, :4] if batch_first else tokens(False, seed=2)[:4],
    )
    padding = MASKS["padding to the right"]["src_key_padding_mask"]
    masks = {
        "src_mask": WINDOW,
        "tgt_mask": CAUSAL[:4, :4],
        "memory_mask": torch.zeros(4, N_TOKENS),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_is_causal": True,
    }

    def call(m: Any) -> torch.Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # masks of two dtypes
            result: torch.Tensor = m(source, target, **masks)
        return result

    check_against_float(model, int8_model, call)


def attention(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(nn.ModuleDict({"attention": nn.MultiheadAttention(EMBED, HEADS, **options)}).eval())


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_weights_are_those_of_torch(
    need_weights: bool, average: bool, batch_first: bool, batched: bool
) -> None:
    model = attention(batch_first=batch_first)
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    query, key = tokens(batch_first)[:, :5] if batch_first else tokens(False)[:5], tokens(batch_first, seed=2)
    value, padding = tokens(batch_first, seed=3), PADDING
    if not batched:
        query, key, value = (t[1] if batch_first else t[:, 1] for t in (query, key, value))
        padding = PADDING[1]

    def call(m: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        result: tuple[torch.Tensor, torch.Tensor | None] = m["attention"](
            query, key, value, padding, need_weights, WINDOW[:5], average_attn_weights=average
        )
        return result

    y, weights = call(model)
    int8_y, int8_weights = call(int8_model)
    assert 0 < (int8_y - y).abs().max() < QUANTIZING
    with exact_products():
        same_y, same_weights = call(int8_model)
    twin_y, twin_weights = call(float_twin(model, int8_model))
    assert (same_y - twin_y).abs().max() < ROUNDING
    if not need_weights:
        assert weights is None and int8_weights is None
        return
    assert weights is not None and int8_weights is not None and same_weights is not None and twin_weights is not None
    assert (same_weights - twin_weights).abs().max() < ROUNDING
    assert (int8_weights - weights).abs().max() < QUANTIZING
    assert int8_weights.shape == weights.shape


def test_attention_without_biases() -> None:
    model = attention(bias=False, batch_first=True)
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    check_against_float(model, int8_model, lambda m: m["attention"](tokens(), tokens(), tokens())[0])


def test_row_that_sees_nothing_is_what_torch_makes_of_it() -> None:
    hidden = torch.zeros(N_TOKENS, N_TOKENS).bool()
    hidden[2] = True
    model = attention(batch_first=True)
    int8_model = int8convert.quantize_(copy.deepcopy(model))
    for need_weights in (True, False):
        y, int8_y = (
            m["attention"](tokens(), tokens(), tokens(), attn_mask=hidden, need_weights=need_weights)[0]
            for m in (model, int8_model)
        )
        assert torch.equal(y.isnan(), int8_y.isnan())
        assert (y - int8_y).nan_to_num().abs().max() < QUANTIZING


def test_dropout_is_of_the_attention_and_in_training_alone() -> None:
    model = int8convert.quantize_(attention(dropout=0.5, batch_first=True))["attention"]
    x = tokens()

    def call(need_weights: bool) -> torch.Tensor:
        torch.manual_seed(3)
        result: torch.Tensor = model(x, x, x, need_weights=need_weights)[0]
        return result

    for need_weights in (True, False):
        model.dropout = 0.0
        expected = call(need_weights)
        model.dropout = 0.5
        assert (call(need_weights) - model.train()(x, x, x, need_weights=need_weights)[0]).abs().max() > 0.1
        model.eval()
        assert torch.equal(call(need_weights), expected)
    model.train()
    weights = model(x, x, x)[1]
    assert (weights.sum(-1) - 1).abs().max() > 0.1


class Masked(nn.MultiheadAttention):
    def forward(self, *inputs: Any, **named: Any) -> Any:
        y, weights = super().forward(*inputs, **named)
        return 2 * y, weights


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True),
        nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True),
        nn.MultiheadAttention(EMBED, HEADS, kdim=EMBED, vdim=16),
        Masked(EMBED, HEADS),
    ],
    ids=["zero token", "learned token", "other sizes", "subclass"],
)
def test_attention_of_another_kind_is_left_alone_with_its_projections(module: nn.MultiheadAttention) -> None:
    model = nn.ModuleDict({"attention": copy.deepcopy(module), "fc": nn.Linear(EMBED, EMBED)})
    int8convert.quantize_(model)
    assert int8_names(model) == ["fc"]
    x = torch.randn(5, 3, EMBED)
    value = x[..., : module.vdim]
    assert torch.equal(model["attention"](x, x, value)[0], module(x, x, value)[0])


def test_attention_whose_weight_another_module_shares_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(EMBED, HEADS), "b": nn.MultiheadAttention(EMBED, HEADS)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    model["fc"] = nn.Linear(EMBED, EMBED)
    int8convert.quantize_(model)
    assert int8_names(model) == ["fc"]


@pytest.mark.parametrize("leaf", ["in_proj_weight", "out_proj.weight"])
def test_attention_weight_that_is_not_finite_is_an_error(leaf: str) -> None:
    model = attention()
    model["attention"].get_parameter(leaf).data[3, 3] = float("nan")
    with pytest.raises(NonFiniteWeightError, match=rf"'attention.{leaf}' holds 1 value that") as caught:
        int8convert.quantize_(model)
    assert caught.value.module_name == "attention" and int8_names(model) == []


def test_hint_of_a_causal_mask_without_the_mask_is_an_error() -> None:
    model = int8convert.quantize_(attention())
    with pytest.raises(ValueError, match="is_causal"):
        model["attention"](tokens(), tokens(), tokens(), is_causal=True)


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_mask_of_integers_is_an_error(name: str) -> None:
    """It would be added to the scores."""
    model = int8convert.quantize_(attention(batch_first=True))
    mask = WINDOW if name == "attn_mask" else PADDING
    with pytest.raises(TypeError, match=r"torch\.uint8, expected a float or torch\.bool"):
        model["attention"](tokens(), tokens(), tokens(), **{name: mask.to(torch.uint8)})


@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_projections_run_in_the_mode_and_threshold_asked_for(mode: str) -> None:
    model = int8convert.quantize_(encoder(), outliers=mode, threshold=5.0)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert {(layer.mode, layer.threshold) for layer in layers} == {(mode, 5.0)}


def test_copy_of_an_int8_encoder_computes_the_same() -> None:
    model = int8convert.quantize_(encoder().eval())
    assert isinstance(model.layers[0].self_attn, Int8MultiheadAttention)
    x = tokens()
    assert torch.equal(run(copy.deepcopy(model), x, False), run(model, x, False))
