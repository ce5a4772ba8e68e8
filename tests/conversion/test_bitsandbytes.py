"""The output against what transformers + bitsandbytes makes of the same source: same keys, same bytes, same logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import int8convert
from cuda_kernels.cpu import row_quantize
from tests.tools.tiny_models import build_model, read_tensors, save_as_pickles, save_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = [
    # bitsandbytes casts bf16 activations and says so at every layer; transformers' 8-bit loader has its own remarks.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

README = (Path(__file__).parents[2] / "README.md").read_text()

CASES = [
    ("opt", torch.float16),
    ("opt", torch.bfloat16),
    ("llama", torch.bfloat16),
    ("qwen3", torch.bfloat16),
    ("gemma3", torch.bfloat16),
    ("gpt_neox", torch.float16),
    ("bloom", torch.float16),
    ("t5", torch.float16),
    ("phi3", torch.bfloat16),
    ("gpt2", torch.float16),
]


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 43).reshape(2, 20)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, **decoder).logits
    return result


def load_int8(model_class: Any, directory: Path) -> Any:
    model, info = model_class.from_pretrained(directory, device_map="cpu", output_loading_info=True)
    assert not any(info.values()), info
    return model


def convert_by_bitsandbytes(model_class: Any, source: Path, directory: Path) -> Any:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = model_class.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_same_keys_bytes_and_logits(name: str, dtype: torch.dtype, tmp_path: Path, map_in_process: None) -> None:
    source = save_checkpoint(name, tmp_path / "source", dtype, max_shard_size="100KB")
    model_class = type(build_model(name))
    int8convert.quantize(source, tmp_path / "ours", on_event=lambda event: None)
    theirs_model = convert_by_bitsandbytes(model_class, source, tmp_path / "theirs")
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    assert sum(tensor.dtype == torch.int8 for tensor in ours.values()) >= 8
    assert torch.equal(logits(load_int8(model_class, tmp_path / "ours")), logits(theirs_model))


def test_source_in_fp32_is_quantized_from_its_own_values(tmp_path: Path, map_in_process: None) -> None:
    """bitsandbytes rounds fp32 weights to fp16 first when it loads a model; its bare op does not, and nor do we."""
    source = save_checkpoint("opt", tmp_path / "source", torch.float32)
    int8convert.quantize(source, tmp_path / "ours", on_event=lambda event: None)
    ours, weights = read_tensors(tmp_path / "ours"), read_tensors(source)
    n_compared = 0
    for key, codes in ours.items():
        if codes.dtype == torch.int8:
            expected, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weights[key])
            assert torch.equal(codes, expected)
            assert torch.equal(ours[key.replace(".weight", ".SCB")], absmax)
            n_compared += 1
    assert n_compared == 12
    load_int8(transformers.OPTForCausalLM, tmp_path / "ours")


@pytest.mark.parametrize("has_prefix", [True, False])
def test_sharded_pickles_like_opt_66b(has_prefix: bool, tmp_path: Path, map_in_process: None) -> None:
    """facebook/opt-66b: fp16 `.bin` shards, tied head stored beside the embedding, keys with or without `model.`."""
    plain = save_checkpoint("opt", tmp_path / "plain")
    source = save_as_pickles(
        plain, tmp_path / "source", 3, rename=str if has_prefix else lambda key: key.removeprefix("model.")
    )
    report = int8convert.quantize(source, tmp_path / "ours", on_event=lambda event: None)
    int8convert.quantize(plain, tmp_path / "from safetensors", on_event=lambda event: None)
    assert report.n_shards == 3 and report.dropped == ("lm_head.weight",)
    ours, expected = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "from safetensors")
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    model_class = transformers.OPTForCausalLM
    theirs = convert_by_bitsandbytes(model_class, plain, tmp_path / "theirs")
    assert torch.equal(logits(load_int8(model_class, tmp_path / "ours")), logits(theirs))


def test_config_without_dtype_still_loads_in_the_sources_dtype(tmp_path: Path, map_in_process: None) -> None:
    """Loaders then go by the first float tensor, which in an int8 shard is a float32 scale."""
    import json

    source = save_checkpoint("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    (source / "config.json").write_text(json.dumps(config))
    int8convert.quantize(source, tmp_path / "ours", on_event=lambda event: None)
    assert load_int8(transformers.LlamaForCausalLM, tmp_path / "ours").dtype == torch.float16


def test_kept_tensors_take_the_dtype_the_model_computes_in(tmp_path: Path, map_in_process: None) -> None:
    """fp32 weights under a config that says float16: a plain load casts them; the int8 loader takes them as stored."""
    import json

    source = save_checkpoint("llama", tmp_path / "source", torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    int8convert.quantize(source, tmp_path / "ours", on_event=lambda event: None)
    convert_by_bitsandbytes(transformers.LlamaForCausalLM, source, tmp_path / "theirs")
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    kept = [key for key, tensor in theirs.items() if tensor.dtype == torch.float16]
    assert "model.norm.weight" in kept
    assert all(torch.equal(ours[key], theirs[key]) for key in kept)
    assert logits(load_int8(transformers.LlamaForCausalLM, tmp_path / "ours")).isfinite().all()


def by_bitsandbytes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax as its layer makes them when it is moved to a device."""
    layer = bitsandbytes.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    return layer.weight.data, layer.weight.SCB


def by_us(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = weight.view(torch.int16).numpy() if weight.dtype is torch.bfloat16 else weight.numpy().view(np.uint32)
    codes, absmax = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    row_quantize(bits, codes, absmax, np.empty(len(weight)), np.empty(len(weight)))
    return torch.from_numpy(codes), torch.from_numpy(absmax)


@pytest.mark.parametrize("largest", [127 * 2.0**-16, 0.01, 1.0])
def test_bf16_rows_of_ordinary_size_are_those_of_bitsandbytes(largest: float) -> None:
    """bitsandbytes rounds to fp16 first, whose values lie 2**-24 apart below 2**-17. In such rows all these are 0."""
    torch.manual_seed(0)
    exponents = torch.empty(256, 1024).uniform_(-30, math.log2(largest))
    weight = (torch.randn(256, 1024).sign() * 2**exponents).bfloat16()
    weight[:, 0] = largest
    for ours, theirs in zip(by_us(weight), by_bitsandbytes(weight), strict=True):
        assert torch.equal(ours, theirs)


def test_exceptions_are_those_that_the_readme_names() -> None:
    """Share of codes that differ, by one, and by how much the scales do: bf16 below fp16's range, and fp32."""
    torch.manual_seed(0)
    normal = torch.randn(512, 1024)
    for weight, low, high, most_scale in (
        ((normal * 1e-4).bfloat16(), 0.0002, 0.0005, 0.0),
        ((normal * 1e-5).bfloat16(), 0.025, 0.035, 0.0),
        (normal * 0.02, 0.006, 0.009, 0.0005),
    ):
        (ours, our_absmax), (theirs, their_absmax) = by_us(weight), by_bitsandbytes(weight)
        assert low < (ours != theirs).float().mean() < high
        assert (ours.int() - theirs.int()).abs().max() == 1
        assert ((our_absmax - their_absmax).abs() / our_absmax).max() <= most_scale
    readme = " ".join(README.split())
    assert "0.8 % of the codes" in readme and "0.03 % at a standard deviation of 1e-4, 3 % at 1e-5" in readme
