"""Checkpoints small enough for a test, of the very classes and file formats people have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

_SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], Any]] = {
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_SIZES, **_TOKENS, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **_TOKENS, **_GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_SIZES, **_TOKENS, **_GROUPED, head_dim=16)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_SIZES, **_TOKENS, **_GROUPED, head_dim=16)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**_SIZES, **_TOKENS, intermediate_size=128)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, **_TOKENS)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_SIZES, **_TOKENS, **_GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, **_TOKENS)
    ),
}


def build_model(name: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
    """A randomly initialised model; the same bits for the same arguments."""
    torch.manual_seed(seed)
    return MODELS[name]().to(dtype).eval()


def save_checkpoint(
    name: str, directory: Path, dtype: torch.dtype = torch.float16, max_shard_size: str = "1GB"
) -> Path:
    """Write a model as transformers does, in safetensors."""
    build_model(name, dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def save_as_pickles(source: Path, directory: Path, n_shards: int, rename: Callable[[str], str] = str) -> Path:
    """The same checkpoint as `pytorch_model*.bin`, the tied head beside its embedding as torch writes it."""
    tensors = read_tensors(source)
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    state_dict = {rename(name): tensor for name, tensor in tensors.items()}
    if embedding is not None and "lm_head.weight" not in state_dict:
        state_dict["lm_head.weight"] = state_dict[rename(embedding)]
    directory.mkdir()
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    names = list(state_dict)
    # The head must lie in the file of the embedding whose storage it shares.
    parts = [[n for n in names[i::n_shards] if n != "lm_head.weight"] for i in range(n_shards)]
    for part in parts:
        if embedding is not None and rename(embedding) in part:
            part.append("lm_head.weight")
    files = [f"pytorch_model-{i + 1:05d}-of-{n_shards:05d}.bin" for i in range(n_shards)]
    if n_shards == 1:
        files = ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: state_dict[name] for name in part}, directory / file)
    if n_shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint, by the safetensors library itself."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a mapping
    return tensors


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Name -> content of every file under a directory, but for the one that tells where the source is."""
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "int8convert/local.json"}


def as_downloaded(directory: Path) -> Path:
    """Add to a checkpoint what the Hub's client leaves beside the files that it downloads: their hashes."""
    metadata = directory / ".cache" / "huggingface" / "download"
    metadata.mkdir(parents=True)
    for path in directory.iterdir():
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            (metadata / f"{path.name}.metadata").write_text(f"abc\n{digest}\n1700000000.0\n")
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
