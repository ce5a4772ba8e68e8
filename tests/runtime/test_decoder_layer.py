"""Decoder layers by kernels: what transformers' own layers compute, for one token of each sequence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from inspect import signature
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from int8convert.runtime.hastened import decoder_layer
from int8convert.runtime.hastened.decoder_layer import hasten_layers, restore_layers
from int8convert.runtime.hastened.float_linear import hasten
from int8convert.runtime.in_memory import quantize_
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode

SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 64}
GATED = {**SIZES, "intermediate_size": 200, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "llama with biases": lambda: transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True),
    "llama with scaled positions": lambda: transformers.LlamaConfig(
        **GATED, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**GATED, head_dim=40, sliding_window=None),
    "mistral with a window": lambda: transformers.MistralConfig(**GATED, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "qwen3": lambda: transformers.Qwen3Config(**GATED, head_dim=32),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=200, word_embed_proj_dim=96, max_position_embeddings=64),
}
CACHE = "cache" if "cache" in signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
DTYPES = (torch.bfloat16, torch.float16)


def made(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model whose norms, biases and outliers are not those of a fresh one."""
    torch.manual_seed(len(name))
    config = CONFIGS[name]()
    config.update(changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name and parameter_name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
            parameter[..., 7] = 9
        elif parameter_name.endswith("bias"):
            parameter.normal_(0, 0.2)
        else:
            parameter.normal_(0, 0.15)
    quantize_(model)
    hasten(model)
    hasten_layers(model)
    return model


@pytest.fixture
def n_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that the kernels computed."""
    calls: list[int] = []
    kernel = decoder_layer.DecoderLayer.attention_and_mlp

    def counted(self: Any, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[0])
        return kernel(self, x, *rest)

    monkeypatch.setattr(decoder_layer.DecoderLayer, "attention_and_mlp", counted)
    return calls


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def step(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    """The model's outputs for tokens that follow those of a cache."""
    return model(ids, use_cache=True, **options, **({} if cache is None else {CACHE: cache}))


def decode(model: Any, ids: torch.Tensor, n_prompt: int = 5) -> torch.Tensor:
    """The logits of each token after the prompt, token by token: [B, tokens, words]."""
    out = step(model, ids[:, :n_prompt])
    logits = []
    for i in range(n_prompt, ids.shape[1]):
        out = step(model, ids[:, i : i + 1], out[CACHE])
        logits.append(out.logits[:, -1].float())
    return torch.stack(logits, 1)


def prompt(n_sequences: int = 1, n_tokens: int = 16) -> torch.Tensor:
    return torch.randint(0, 64, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(3))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_layers_own_code(name: str, dtype: torch.dtype, n_steps: list[int]) -> None:
    model, ids = made(name, dtype), prompt()
    fast = decode(model, ids)
    # The first step of each of two layers goes both ways; the others go by the kernels alone.
    assert n_steps == [1] * 2 * 11
    restore_layers(model)
    own = decode(model, ids)
    assert len(n_steps) == 22
    # As far from each other as torch's two attentions, which add in different orders.
    model.set_attn_implementation("eager")
    other = decode(model, ids)
    assert error(fast, own) <= max(3 * error(other, own), 2 * torch.finfo(dtype).eps)
    assert error(fast[:, 1:], own[:, :-1]) > 0.5  # the measure tells tokens apart


@pytest.mark.parametrize("name", ["qwen3", "opt"])
def test_each_sequence_of_a_batch_is_as_alone(name: str, n_steps: list[int]) -> None:
    model = made(name)
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.mode = OutlierMode.BLOCKS  # found columns depend on the batch, by the paper's rule
    ids = prompt(4)
    batch, alone = decode(model, ids), torch.cat([decode(model, row[None]) for row in ids])
    assert set(n_steps) == {4, 1}
    # The prompt goes through torch, whose sums depend on the batch.
    assert error(batch, alone) < 0.05
    n_steps.clear()
    decode(model, prompt(5))
    assert not n_steps


@pytest.mark.parametrize("n_threads", [2, 3])
def test_bits_do_not_depend_on_the_threads(n_threads: int, n_steps: list[int]) -> None:
    """Attention over 300 positions of four sequences is work for four threads."""
    model, ids, before = made("llama", max_position_embeddings=512), prompt(4, 301), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cache = step(model, ids[:, :300])[CACHE]
        caches = [copy.deepcopy(cache) for _ in range(4)]
        step(model, ids[:, 300:], caches[0])
        alone = step(model, ids[:, 300:], caches[1]).logits
        torch.set_num_threads(n_threads)
        assert torch.equal(step(model, ids[:, 300:], caches[2]).logits, alone)
        assert n_steps == [4] * 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["none", "dynamic+blocks", "static+guard"])
def test_layers_follow_their_mode_and_kept_layers_stay_16_bit(mode: str, n_steps: list[int]) -> None:
    model, ids = made("llama"), prompt()
    decode(model, ids)
    mlp = model.model.layers[0].mlp
    kept = nn.Linear(200, 96, bias=False).to(torch.bfloat16).requires_grad_(False)
    kept.weight.copy_(mlp.down_proj.dequantize(torch.bfloat16))
    mlp.down_proj = kept
    hasten(model)
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.mode = OutlierMode(mode)
            if layer.mode.uses_stored:
                columns = torch.tensor([3, 7])
                layer.set_outliers(columns, layer.dequantize(torch.bfloat16)[:, columns] + 0.5)
    n_steps.clear()
    fast = decode(model, ids)
    assert len(n_steps) == 22
    restore_layers(model)
    own = decode(model, ids)
    assert error(fast, own) < 0.05
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.mode = OutlierMode.DYNAMIC
    assert not torch.equal(decode(model, ids), own)  # the mode matters


@pytest.mark.parametrize("case", ["scale", "stored columns", "scaling", "class"])
def test_what_a_table_is_made_of_is_seen_to_change(case: str, n_steps: list[int]) -> None:
    """Scales of compressed-tensors and columns of another dtype are copied for the kernels."""
    model, ids = made("llama"), prompt()
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            if case == "scale":
                layer.register_parameter("weight_scale", nn.Parameter(layer.SCB.data[:, None] / 127, False))
                layer.scale_name, layer.stores_absmax = "weight_scale", False
            layer.mode = OutlierMode.STATIC
            layer.set_outliers(torch.tensor([3]), layer.dequantize()[:, [3]])
    if case == "class":
        kept = nn.Linear(200, 96, bias=False).to(torch.bfloat16).requires_grad_(False)
        model.model.layers[0].mlp.down_proj = kept
    before = decode(model, ids)
    for layer in model.modules():
        if isinstance(layer, Int8Linear) and case == "scale":
            layer.weight_scale.mul_(1.5)
        elif isinstance(layer, Int8Linear) and case == "stored columns":
            layer.outlier_weight.add_(3)
    if case == "scaling":
        for layer in model.model.layers:
            layer.self_attn.scaling *= 3
    n_steps.clear()
    if case == "class":
        hasten(model)
        decode(model, ids)
        assert len(n_steps) == 22
        return
    fast = decode(model, ids)
    assert len(n_steps) == 22 and error(fast, before) > 0.1
    restore_layers(model)
    assert error(fast, decode(model, ids)) < 0.06


def test_changed_weights_are_seen(n_steps: list[int]) -> None:
    model, ids = made("qwen2"), prompt()
    before = decode(model, ids)
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.flip(0).contiguous()
    layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.flip(0), requires_grad=False)
    layer.self_attn, model.model.layers[0].self_attn = model.model.layers[0].self_attn, layer.self_attn
    layer.self_attn.layer_idx, model.model.layers[0].self_attn.layer_idx = 1, 0
    fast = decode(model, ids)
    assert error(fast, before) > 0.1
    restore_layers(model)
    assert error(fast, decode(model, ids)) < 0.05


@pytest.mark.parametrize("case", ["hook", "forward", "adapter", "rotated input", "other part"])
def test_what_is_inside_a_layer_runs(case: str, n_steps: list[int]) -> None:
    model, ids, called = made("llama"), prompt(), []
    if case != "other part":
        decode(model, ids)
    for layer in model.model.layers:
        attention = layer.self_attn
        if case == "hook":
            attention.o_proj.register_forward_hook(lambda *_: called.append(1))
        elif case == "forward":
            plain = attention.v_proj.forward
            attention.v_proj.forward = lambda x, plain=plain: called.append(1) or plain(x)
        elif case == "adapter":
            attention.q_proj = nn.Sequential(attention.q_proj)
            attention.q_proj.register_forward_hook(lambda *_: called.append(1))
        elif case == "rotated input":
            layer.mlp.down_proj.input_block = 8
            called.append(1)
        else:
            layer.mlp.more = nn.Linear(2, 2)
            called.append(1)
    n_steps.clear()
    decode(model, ids)
    assert called and not n_steps


@pytest.mark.parametrize(
    "case",
    ["another attention", "another size", "no cache", "gradients", "training", "watched", "autocast", "two tokens"],
)
def test_other_calls_take_the_layers_own_code(case: str, n_steps: list[int]) -> None:
    model, ids = made("qwen2"), prompt(2)
    if case == "another attention":
        model.set_attn_implementation("eager")
        decode(model, ids)
    elif case == "another size":
        cache = step(model, ids[:, :5])[CACHE]
        with pytest.raises(RuntimeError, match="must match"):
            model.model(inputs_embeds=torch.randn(2, 1, 16).bfloat16(), use_cache=True, **{CACHE: cache})
    elif case == "no cache":
        model(ids[:, :1], use_cache=False)
    elif case == "gradients":
        with torch.enable_grad():
            decode(model, ids)
    elif case == "training":
        decode(model.train(), ids)
    elif case == "watched":
        with torch.profiler.profile():
            decode(model, ids)
    elif case == "autocast":
        with torch.autocast("cpu"):
            decode(model, ids)
    else:
        cache = step(model, ids[:, :5])[CACHE]
        step(model, ids[:, 5:7], cache)
    assert not n_steps


@pytest.mark.parametrize("is_static", [False, True])
def test_padding_is_not_attended_to(is_static: bool, n_steps: list[int]) -> None:
    model, ids = made("qwen2"), prompt(2)
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.mode = OutlierMode.BLOCKS
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(0)

    def masked() -> torch.Tensor:
        """The logits of the last tokens of both sequences; the first has four tokens of padding."""
        cache = transformers.StaticCache(model.config, max_cache_len=24) if is_static else None
        out = step(model, ids[:, :8], cache, attention_mask=mask[:, :8], position_ids=positions[:, :8])
        logits = []
        for i in range(8, 16):
            options = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            out = step(model, ids[:, i : i + 1], out[CACHE], **options)
            logits.append(out.logits[:, -1].float())
        return torch.stack(logits, 1)

    fast = masked()
    assert n_steps == [2] * 2 * 8
    alone = decode(model, ids[:1, 4:], 4)
    assert error(fast[:1], alone) < 0.05
    restore_layers(model)
    assert error(fast, masked()) < 0.05


def test_recorded_states_are_those_of_the_layers(n_steps: list[int]) -> None:
    model, ids = made("llama"), prompt()
    cache = step(model, ids[:, :5])[CACHE]
    for i in (5, 6):
        out = step(model, ids[:, i : i + 1], cache, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and n_steps == [1] * 4
    restore_layers(model)
    cache = step(model, ids[:, :5])[CACHE]
    for i in (5, 6):
        own = step(model, ids[:, i : i + 1], cache, output_hidden_states=True)
    assert all(error(a.float(), b.float()) < 0.05 for a, b in zip(out.hidden_states, own.hidden_states, strict=True))


@pytest.mark.parametrize("case", ["scale", "rotation"])
def test_a_layer_whose_code_computes_something_else_keeps_it(case: str, n_steps: list[int]) -> None:
    model, ids = made("llama"), prompt()
    for layer in model.model.layers:
        plain = layer._plain

        class Changed(plain):  # type: ignore[misc, valid-type]
            def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
                if case == "rotation":
                    cos, sin = options["position_embeddings"]
                    return super().forward(hidden_states, *args, **options | {"position_embeddings": (cos, -sin)})
                y = super().forward(hidden_states, *args, **options)
                return hidden_states + (y - hidden_states) * 1.2

        layer.__class__ = Changed
    own = decode(model, ids)
    for layer in model.model.layers:
        # A release of transformers in which the class of this name computes this.
        cls = type(layer)
        cls.__name__, cls.__module__ = "LlamaDecoderLayer", "transformers.models.llama.modeling_llama"
    hasten_layers(model)
    # One token alone shows neither the rotation nor the scores: it decides nothing.
    step(model, ids[:, :1])
    assert torch.equal(decode(model, ids), own)
    assert n_steps == [1, 1]  # each layer's first step, and no other


def test_classes_of_the_same_name_elsewhere_stay() -> None:
    class LlamaDecoderLayer(nn.Module):
        pass

    layer = LlamaDecoderLayer()
    hasten_layers(layer)
    assert type(layer) is LlamaDecoderLayer


def test_copies_are_plain_and_compute_the_same(n_steps: list[int]) -> None:
    model, ids = made("opt"), prompt()
    decode(model, ids)
    n_steps.clear()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    restore_layers(model)
    own = decode(model, ids)
    for each in copies:
        assert type(each.model.decoder.layers[0]) is type(model.model.decoder.layers[0])
        assert torch.equal(decode(each, ids), own)
    assert not n_steps


def test_long_contexts_and_odd_heads(n_steps: list[int]) -> None:
    """Attention over more positions than a vector holds, and heads that are no multiple of one."""
    config = transformers.LlamaConfig(**{**GATED, "head_dim": 44, "max_position_embeddings": 512})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    quantize_(model, outliers="none")
    hasten_layers(hastened := copy.deepcopy(model))
    hasten(hastened)
    ids = prompt(1, 300)
    assert error(decode(hastened, ids, 290), decode(model, ids, 290)) < 0.05
    assert len(n_steps) == 20


def test_sequences_that_attend_to_nothing_are_as_in_torch(n_steps: list[int]) -> None:
    model, ids = made("llama"), prompt(2)
    cache = step(model, ids[:, :5])[CACHE]
    step(model, ids[:, 5:6], cache)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1] = False
    other = copy.deepcopy(cache)
    fast = step(model, ids[:, 6:7], cache, attention_mask=mask).logits
    assert len(n_steps) == 4 and torch.isfinite(fast).all()
    restore_layers(model)
    assert error(fast.float(), step(model, ids[:, 6:7], other, attention_mask=mask).logits.float()) < 0.05


def test_keys_may_lie_otherwise_in_the_cache(n_steps: list[int]) -> None:
    model, ids = made("llama"), prompt()
    expected = decode(model, ids)

    class Transposed(transformers.DynamicCache):  # type: ignore[misc]
        def update(self, *args: Any, **options: Any) -> Any:
            return tuple(each.mT.contiguous().mT for each in super().update(*args, **options))

    out = step(model, ids[:, :5], Transposed(config=model.config))
    n_steps.clear()
    for i in range(5, 16):
        out = step(model, ids[:, i : i + 1], out[CACHE])
        assert error(out.logits[0, -1].float(), expected[0, i - 5]) < 0.05
    assert len(n_steps) == 22


def test_exponentials() -> None:
    from cuda_kernels.cpu.objects import Kernel

    x = np.concatenate([np.linspace(-100, 100, 4001), [0.0, -0.0, np.nan, -np.inf, np.inf, 1e-30]]).astype(np.float32)
    y = np.empty_like(x)
    Kernel("decoder.elementary", "exponentials")(x, y)
    exact = np.exp(np.clip(x, None, 88.3).astype(np.float64))
    inside = (x >= -87.3) & ~np.isnan(x)
    np.testing.assert_allclose(y[inside], exact[inside], rtol=2.5 * 2.0**-23)
    assert (y[x < -87.3] == 0).all() and np.isnan(y[np.isnan(x)]).all()


def test_a_bound_forward_is_left_alone() -> None:
    model = made("llama")
    restore_layers(model)
    layer = model.model.layers[0]
    layer.forward = MethodType(type(layer).forward, layer)
    hasten_layers(model)
    assert [hasattr(each, "_plain") for each in model.model.layers] == [False, True]
