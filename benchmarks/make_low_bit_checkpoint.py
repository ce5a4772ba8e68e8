#!/usr/bin/env python3
"""Write the largest low-bit checkpoints as sparse files, for dry runs: right names, shapes and sizes, zeros inside.

Names, shapes and configs are those of the published models. Each shard's file is as large as the real one and takes a
few kilobytes of disk.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}
_SHARD_BYTES = 5_000_000_000

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape."""

Encode = Callable[[str, int, int], Iterator[Tensor]]
"""The tensors of the weight of a module, by its name and size [out, in]."""


def plain(module: str, n_out: int, n_in: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "BF16", (n_out, n_in)


def fp8_blocks(module: str, n_out: int, n_in: int) -> Iterator[Tensor]:
    yield f"{module}.weight", "F8_E4M3", (n_out, n_in)
    yield f"{module}.weight_scale_inv", "F32", (-(-n_out // 128), -(-n_in // 128))


def packed_4_bits(module: str, n_out: int, n_in: int) -> Iterator[Tensor]:
    yield f"{module}.weight_packed", "I32", (n_out, n_in // 8)
    yield f"{module}.weight_scale", "BF16", (n_out, n_in // 32)
    yield f"{module}.weight_shape", "I64", (2,)


def nvfp4(module: str, n_out: int, n_in: int) -> Iterator[Tensor]:
    yield f"{module}.weight_packed", "U8", (n_out, n_in // 2)
    yield f"{module}.weight_scale", "F8_E4M3", (n_out, n_in // 16)
    yield f"{module}.weight_global_scale", "F32", (1,)
    yield f"{module}.input_global_scale", "F32", (1,)


def _norms(*names: str, size: int) -> Iterator[Tensor]:
    for name in names:
        yield f"{name}.weight", "BF16", (size,)


def _outer(vocabulary: int, hidden: int) -> Iterator[Tensor]:
    yield from plain("model.embed_tokens", vocabulary, hidden)
    yield from plain("lm_head", vocabulary, hidden)
    yield from _norms("model.norm", size=hidden)


def _deepseek(config: dict[str, Any], linear: Encode, expert: Encode) -> Iterator[Tensor]:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    yield from _outer(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", size=hidden)
        attention, rank = f"{layer}.self_attn", config["q_lora_rank"]
        yield from linear(f"{attention}.q_a_proj", rank, hidden)
        yield from linear(f"{attention}.q_b_proj", heads * (nope + rope), rank)
        yield from linear(f"{attention}.kv_a_proj_with_mqa", latent + rope, hidden)
        yield from linear(f"{attention}.kv_b_proj", heads * (nope + value), latent)
        yield from linear(f"{attention}.o_proj", hidden, heads * value)
        yield from _norms(f"{attention}.q_a_layernorm", size=rank)
        yield from _norms(f"{attention}.kv_a_layernorm", size=latent)
        if i < config["first_k_dense_replace"]:
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"], linear)
            continue
        middle = config["moe_intermediate_size"]
        yield from plain(f"{layer}.mlp.gate", config["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        yield from _mlp(f"{layer}.mlp.shared_experts", hidden, middle * config["n_shared_experts"], linear)
        for e in range(config["n_routed_experts"]):
            yield from _mlp(f"{layer}.mlp.experts.{e}", hidden, middle, expert)


def _mlp(module: str, hidden: int, middle: int, encode: Encode) -> Iterator[Tensor]:
    yield from encode(f"{module}.gate_proj", middle, hidden)
    yield from encode(f"{module}.up_proj", middle, hidden)
    yield from encode(f"{module}.down_proj", hidden, middle)


def _qwen3(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, size = config["hidden_size"], config["head_dim"]
    yield from _outer(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", size=hidden)
        yield from _norms(f"{layer}.self_attn.q_norm", f"{layer}.self_attn.k_norm", size=size)
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            yield from nvfp4(f"{layer}.self_attn.{name}_proj", config[heads] * size, hidden)
        yield from nvfp4(f"{layer}.self_attn.o_proj", hidden, config["num_attention_heads"] * size)
        yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"], nvfp4)


def _gpt_oss(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, middle, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _outer(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield from _norms(f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", size=hidden)
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        sizes = {"q": heads * 64, "k": groups * 64, "v": groups * 64}
        for name, size in sizes.items():
            yield from plain(f"{layer}.self_attn.{name}_proj", size, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", "BF16", (size,)
        yield from plain(f"{layer}.self_attn.o_proj", hidden, heads * 64)
        yield f"{layer}.self_attn.o_proj.bias", "BF16", (hidden,)
        yield f"{layer}.self_attn.sinks", "BF16", (heads,)
        yield from plain(f"{layer}.mlp.router", experts, hidden)
        yield f"{layer}.mlp.router.bias", "BF16", (experts,)
        for name, n_out, n_in in (("gate_up_proj", 2 * middle, hidden), ("down_proj", hidden, middle)):
            stem = f"{layer}.mlp.experts.{name}"
            yield f"{stem}_blocks", "U8", (experts, n_out, n_in // 32, 16)
            yield f"{stem}_scales", "U8", (experts, n_out, n_in // 32)
            yield f"{stem}_bias", "BF16", (experts, n_out)


_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
_V3 = {"num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "first_k_dense_replace": 3}
_K2 = {"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def _compressed(form: str, weights: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ignore}


_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "dtype": "bfloat16",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        **_DEEPSEEK,
        **_V3,
        "vocab_size": 129280,
        "n_group": 8,
        "topk_group": 4,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "kimi-k2": {
        **_DEEPSEEK,
        **_K2,
        "vocab_size": 163840,
        "n_group": 1,
        "topk_group": 1,
        "quantization_config": _compressed(
            "pack-quantized",
            _INT4,
            ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        ),
    },
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "qwen3-32b-nvfp4": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "quantization_config": _compressed("nvfp4-pack-quantized", _FP4, ["lm_head"]),
    },
}


def list_tensors(name: str) -> Iterator[Tensor]:
    """Yield the tensors of a model, in the order of its files."""
    config = CONFIGS[name]
    if name == "deepseek-v3":
        return _deepseek(config, fp8_blocks, fp8_blocks)
    if name == "kimi-k2":
        return _deepseek(config, plain, packed_4_bits)
    return _gpt_oss(config) if name.startswith("gpt-oss") else _qwen3(config)


def write_checkpoint(name: str, out: Path) -> int:
    """Write a checkpoint into a directory, which is made, and return the bytes of its tensors."""
    shards: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in list_tensors(name):
        n_bytes = _BYTES[tensor[1]] * prod(tensor[2])
        if size and size + n_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + n_bytes, total + n_bytes
    out.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, tensors in zip(names, shards, strict=True):
        _write_shard(out / file_name, tensors)
    weight_map = {tensor[0]: file_name for file_name, part in zip(names, shards, strict=True) for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(CONFIGS[name], indent=2))
    return total


def _write_shard(path: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        n_bytes = _BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("out", type=Path, help="directory to write into; made where it is missing")
    options = parser.parse_args()
    print(f"{write_checkpoint(options.model, options.out) / 1e9:,.1f} GB of tensors")


if __name__ == "__main__":
    main()
