#!/usr/bin/env python3
"""Write a checkpoint of a given OPT shape with random weights, for benchmarks and trials.

How it goes:
1. The tensor names and shapes follow from the shape (`list_tensors`), in the order of the model's layers.
2. They are split over the shards by position: all shards have about the same size.
3. Each shard is a safetensors header followed by bytes from a pool of random normals, read round and round. The pool's
   length is prime, so that equal tensors do not get equal bytes.
4. The index comes last: a directory that has one is complete.

Costs the pool (32 MB) and one write per tensor, so the speed is that of the page cache. With `--headers-only` the data
is a hole in a sparse file: any size takes a few hundred kB of disk, and reads as zeros.

Left out on purpose: a tokenizer, and weights a model could be judged by. Norms are ones, so a forward stays finite.
"""

import argparse
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

POOL_ELEMENTS = 16_777_213  # the largest prime below 2^24
WEIGHT_STD = 0.02  # OPTConfig.init_std
BYTES_PER_ELEMENT = 2
POSITION_ROWS = 2050  # OPT keeps two rows before its 2048 positions
INDEX_NAME = "model.safetensors.index.json"
SAFETENSORS_DTYPE = {"float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Shape:
    """What fixes the size of an OPT checkpoint. `vocab` is 50265 padded to a multiple of 8, as in Meta's files."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    n_shards: int
    vocab: int = 50_272


SHAPES = {
    "tiny": Shape(hidden=512, ffn=2048, layers=4, heads=8, n_shards=3, vocab=1024),
    "opt-1.3b": Shape(hidden=2048, ffn=8192, layers=24, heads=32, n_shards=6),
    "opt-6.7b": Shape(hidden=4096, ffn=16384, layers=32, heads=32, n_shards=7),
    "opt-13b": Shape(hidden=5120, ffn=20480, layers=40, heads=40, n_shards=13),
    "opt-66b": Shape(hidden=9216, ffn=36864, layers=64, heads=72, n_shards=14),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor's name and shape. `is_norm_weight` marks those filled with ones."""

    name: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * BYTES_PER_ELEMENT

    @property
    def is_norm_weight(self) -> bool:
        return self.name.endswith("layer_norm.weight")


def list_tensors(shape: Shape) -> list[Tensor]:
    """Return every tensor of the checkpoint in file order; `lm_head` is tied to the embedding and therefore absent."""
    tensors = [
        Tensor("model.decoder.embed_tokens.weight", (shape.vocab, shape.hidden)),
        Tensor("model.decoder.embed_positions.weight", (POSITION_ROWS, shape.hidden)),
    ]
    for layer in range(shape.layers):
        tensors += _list_layer_tensors(shape, f"model.decoder.layers.{layer}")
    return tensors + _pair("model.decoder.final_layer_norm", (shape.hidden,))


def _list_layer_tensors(shape: Shape, prefix: str) -> list[Tensor]:
    tensors = []
    for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
        tensors += _pair(f"{prefix}.self_attn.{projection}", (shape.hidden, shape.hidden))
    tensors += _pair(f"{prefix}.self_attn_layer_norm", (shape.hidden,))
    tensors += _pair(f"{prefix}.fc1", (shape.ffn, shape.hidden))
    tensors += _pair(f"{prefix}.fc2", (shape.hidden, shape.ffn))
    return tensors + _pair(f"{prefix}.final_layer_norm", (shape.hidden,))


def _pair(module_name: str, weight_shape: tuple[int, ...]) -> list[Tensor]:
    return [Tensor(f"{module_name}.weight", weight_shape), Tensor(f"{module_name}.bias", weight_shape[:1])]


def split_into_shards(tensors: list[Tensor], n_shards: int) -> list[list[Tensor]]:
    """Give each tensor to the shard in whose share of all bytes it begins; keeps the order.

    Raises:
        ValueError: `n_shards` is below 1, or a shard would stay empty because one tensor is larger than its share.
    """
    if n_shards < 1:
        raise ValueError(f"a checkpoint has at least 1 shard, not {n_shards}")
    total_bytes = sum(tensor.n_bytes for tensor in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(n_shards)]
    position = 0
    for tensor in tensors:
        shards[position * n_shards // total_bytes].append(tensor)
        position += tensor.n_bytes
    if not all(shards):
        raise ValueError(f"{n_shards} shards are too many: one tensor is larger than {total_bytes // n_shards:,} bytes")
    return shards


class RandomBytes:
    """An endless stream of random normals (mean 0, std 0.02) in one 16-bit format, from a pool made once."""

    def __init__(self, dtype: str, seed: int) -> None:
        normals = np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, dtype=np.float32)
        normals *= np.float32(WEIGHT_STD)
        # bfloat16 is the upper half of float32; for random weights cutting is as good as rounding.
        half = (
            normals.astype(np.float16).view(np.uint16) if dtype == "float16" else normals.view(np.uint16)[1::2].copy()
        )
        self._pool = half.data.cast("B")
        self._position = 0

    def write_to(self, file: BinaryIO, n_bytes: int) -> None:
        """Write the next `n_bytes` of the stream."""
        while n_bytes:
            piece = self._pool[self._position : self._position + n_bytes]
            file.write(piece)
            n_bytes -= len(piece)
            self._position = (self._position + len(piece)) % len(self._pool)


def encode_header(tensors: list[Tensor], dtype: str) -> bytes:
    """Return a shard's safetensors header: its length in 8 bytes, then JSON padded to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.n_bytes]
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPE[dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(path: Path, tensors: list[Tensor], dtype: str, weights: RandomBytes | None) -> None:
    """Write one shard; with `weights=None` only its header, the data being a hole of the right size."""
    header = encode_header(tensors, dtype)
    with path.open("wb") as file:
        file.write(header)
        if weights is None:
            file.truncate(len(header) + sum(tensor.n_bytes for tensor in tensors))
            return
        one = struct.pack("<e", 1.0) if dtype == "float16" else struct.pack("<f", 1.0)[2:]
        for tensor in tensors:
            if tensor.is_norm_weight:
                file.write(one * tensor.shape[0])
            else:
                weights.write_to(file, tensor.n_bytes)


def build_config(shape: Shape, dtype: str) -> dict[str, object]:
    """Return the `config.json` of an OPTForCausalLM of this shape."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "dtype": dtype,
        "eos_token_id": 2,
        "ffn_dim": shape.ffn,
        "hidden_size": shape.hidden,
        "init_std": WEIGHT_STD,
        "layerdrop": 0.0,
        "max_position_embeddings": POSITION_ROWS - 2,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "pad_token_id": 1,
        "prefix": "</s>",
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab,
        "word_embed_proj_dim": shape.hidden,
    }


def write_checkpoint(
    out: Path, shape: Shape, *, dtype: str = "float16", seed: int = 0, headers_only: bool = False
) -> int:
    """Write a complete checkpoint into `out`, a directory that is made or filled, and return its tensors' bytes.

    Args:
        out: existing shards of the same names are overwritten, anything else is left alone.
        dtype: "float16" or "bfloat16".
        seed: the same seed gives the same bytes.
        headers_only: leave the tensors' data as holes in sparse files.

    Raises:
        ValueError: `shape.n_shards` is too large, see `split_into_shards`.
    """
    shards = split_into_shards(list_tensors(shape), shape.n_shards)
    out.mkdir(parents=True, exist_ok=True)
    # An index left from an earlier run would call this one complete before it is.
    (out / INDEX_NAME).unlink(missing_ok=True)
    weights = None if headers_only else RandomBytes(dtype, seed)
    for name, tensors in zip(_shard_names(shape.n_shards), shards, strict=True):
        write_shard(out / name, tensors, dtype, weights)
    generation_config = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    _write_json(out / "config.json", build_config(shape, dtype))
    _write_json(out / "generation_config.json", generation_config)
    return _write_index(out, shards)


def _shard_names(n_shards: int) -> Iterator[str]:
    return (f"model-{number:05}-of-{n_shards:05}.safetensors" for number in range(1, n_shards + 1))


def _write_index(out: Path, shards: list[list[Tensor]]) -> int:
    total_bytes = sum(tensor.n_bytes for tensors in shards for tensor in tensors)
    weight_map = {
        tensor.name: name for name, tensors in zip(_shard_names(len(shards)), shards, strict=True) for tensor in tensors
    }
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return total_bytes


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a checkpoint of an OPT shape with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path, help="directory to write into; made where it is missing")
    parser.add_argument("--dtype", choices=SAFETENSORS_DTYPE, default="float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, help="number of shards instead of the shape's own")
    parser.add_argument("--headers-only", action="store_true", help="sparse files: right sizes, zeros inside, no disk")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    shape: Shape = SHAPES[options.shape]
    if options.shards is not None:
        shape = replace(shape, n_shards=options.shards)
    needed_bytes = sum(tensor.n_bytes for tensor in list_tensors(shape))
    options.out.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(options.out).free
    if not options.headers_only and needed_bytes > free_bytes:
        raise SystemExit(
            f"error: {options.shape} needs {needed_bytes:,} bytes, '{options.out}' has {free_bytes:,} free\n"
            "hint: --headers-only writes sparse files that take no disk"
        )
    try:
        total_bytes = write_checkpoint(
            options.out, shape, dtype=options.dtype, seed=options.seed, headers_only=options.headers_only
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps({"shape": options.shape, **asdict(shape), "dtype": options.dtype, "tensor_bytes": total_bytes}))


if __name__ == "__main__":
    main()
