"""Repositories as people have them, small: file name -> content."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.tools.tiny_models import save_as_pickles

Files = dict[str, bytes | Path]

NAME = "facebook/opt-66b"
_CARD = b"---\nlicense: other\n---\n# OPT\n"


def save_opt(folder: Path, width: int = 128, n_layers: int = 3, max_shard_size: str = "1GB") -> Path:
    """An OPT with the shapes' proportions of a large one, in safetensors."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=8 * width,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.OPTForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def opt_66b(folder: Path, n_shards: int = 3, **sizes: int) -> Files:
    """As facebook/opt-66b is: `.bin` shards of keys without `model.`, the tied head written, other formats beside."""
    source = save_opt(folder / "saved", **sizes)  # type: ignore[arg-type]
    directory = save_as_pickles(source, folder / "bin", n_shards, lambda name: name.removeprefix("model."))
    return files_of(directory) | {
        "README.md": _CARD,
        "flax_model.msgpack": b"not wanted" * 500,
        "tf_model.h5": b"not wanted either" * 500,
        "original/consolidated.00.pth": b"nor this" * 500,
    }


def files_of(directory: Path) -> Files:
    """All files of a directory."""
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}
