"""The output against what transformers + bitsandbytes makes of the same source: same keys, same bytes, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import int8convert
from tests.tiny_models import build_model, read_tensors, save_as_pickles, save_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = [
    # bitsandbytes casts bf16 activations and says so at every layer; transformers' 8-bit loader has its own remarks.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

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
