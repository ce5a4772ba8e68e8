"""Checkpoints of strangers, whole and spoiled, and the commands that meet them. Shared by every test of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from int8convert.verification.earlier_runs import write_report
from int8convert.verification.verify import verify
from tests.tools.options import quantize

N_WORDS = 128
"""Vocabulary of `make_model`; token i from 3 on is the word `w{i}`."""

INDEX_NAME = "model.safetensors.index.json"


def make_model(directory: Path, seed: int = 0, n_shards: int = 1, without: tuple[str, ...] = (), **config: Any) -> Path:
    """Write a float16 Llama of two layers with a tokenizer of words, as transformers writes it.

    Args:
        n_shards: 1 writes model.safetensors, more write an index.
        without: tensors that are left out of the files and of the index.
        config: entries that replace those of config.json after the weights were made.
    """
    torch.manual_seed(seed)
    sizes = {"vocab_size": N_WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2))
    model.half().save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_shards(directory, {name: t for name, t in tensors.items() if name not in without}, n_shards)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, N_WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)
    if config:
        change(directory / "config.json", **config)
    return directory


def write_shards(directory: Path, tensors: Mapping[str, torch.Tensor], n_shards: int) -> None:
    """Write tensors as one model.safetensors, or as an index and shards of equally many tensors each."""
    if n_shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(n_shards):
        part = names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]
        file_name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    write_index(directory, weight_map)


def write_index(directory: Path, weight_map: Mapping[str, str]) -> None:
    write(directory / INDEX_NAME, {"metadata": {}, "weight_map": dict(weight_map)})


def write(path: Path, value: object) -> Path:
    """Write a JSON value, or a text as it is; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def change(path: Path, **entries: Any) -> Path:
    """Replace entries of a JSON object; a file that is not there begins empty."""
    return write(path, {**(json.loads(path.read_text()) if path.exists() else {}), **entries})


def change_block(out: Path, **entries: Any) -> None:
    """Replace entries of `quantization_config` in config.json."""
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    change(out / "config.json", quantization_config={**block, **entries})


def convert(source: Path, out: Path, **options: Any) -> Path:
    """`int8convert.quantize` in this process; with the fixture `map_in_process`, its model map too."""
    quantize(source, out, **options)
    return out


def passes_exact(out: Path, reference: Path | None = None) -> bool:
    """Whether `verify --level exact` passes an output; its verify.json is written, as the command does."""
    report = verify(out, level="exact", reference=reference)
    write_report(report)
    return report.is_passed


def command(
    *words: str | Path, stdin: str = "", timeout: float = 240, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.CompletedProcess[str]:
    """Run `int8convert WORDS` in a process of its own, with stdout and stderr captured."""
    line = [sys.executable, "-m", "int8convert", *map(str, words)]
    every = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    return subprocess.run(line, input=stdin, capture_output=True, text=True, timeout=timeout, env=every, **how)


Spoil = Callable[[Path], object]
"""Changes a copy of a checkpoint."""


def spoil_text(name: str, content: str) -> Spoil:
    """Replace a file by a text."""
    return lambda directory: write(directory / name, content)


def spoil_entries(name: str, **entries: Any) -> Spoil:
    """Replace entries of a JSON file."""
    return lambda directory: change(directory / name, **entries)
