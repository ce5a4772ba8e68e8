"""Checkpoints in the formats of other libraries, and what is decoded of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

import int8convert
from int8convert.checkpoint.rows import Scratch, as_array, read_rows
from int8convert.decoding.source_weights import find_weights
from int8convert.sources import open_source
from tests.tools.tiny_models import read_tensors

Tensors = dict[str, torch.Tensor]


def save_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], block: object = None) -> Path:
    """Write tensors as a checkpoint without a model."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], **({"quantization_config": block} if block else {})}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def save_coded(
    plain: Path, directory: Path, encode: Callable[[torch.Tensor], Tensors], block: object, ends: str = "_proj.weight"
) -> None:
    """Write a plain checkpoint with its projections encoded.

    Args:
        encode: returns last part of the name -> tensor; "" keeps the weight's own name.
    """
    directory.mkdir()
    tensors: Tensors = {}
    for name, tensor in read_tensors(plain).items():
        if not name.endswith(ends):
            tensors[name] = tensor
            continue
        for leaf, coded in encode(tensor).items():
            tensors[f"{name.removesuffix('weight')}{leaf}"] = coded.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": block}))


def decode(directory: Path, name: str, begin: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
    """Decode rows of a weight, by its 16-bit name."""
    found = find_weights(open_source(directory))
    weight = next(weight for weight in found.by_codes.values() if weight.name == name)
    coding: Any = weight.whole()
    end = weight.shape[0] if end is None else end
    first, last = coding.code_rows(begin, end)
    with closing(weight.codes.shard.open()) as reader:
        block = read_rows(weight.codes.stored, reader, first, last, Scratch())
    codes = as_array(weight.codes.stored, block, first, last)
    decoded: npt.NDArray[np.float32] = coding.open().decode(codes, begin)[: end - begin]
    return decoded


def assert_same(decoded: npt.NDArray[np.float32], expected: torch.Tensor) -> None:
    """Compare bit by bit after one rounding to the dtype of the expected values."""
    found = torch.from_numpy(decoded).to(expected.dtype)
    bits = {2: torch.int16, 4: torch.int32}[expected.dtype.itemsize]
    assert found.shape == expected.shape
    assert torch.equal(found.view(bits), expected.contiguous().view(bits))


def is_verified(out: Path, source: Path) -> bool:
    """Return whether `verify --level exact` finds each tensor as it should be."""
    return int8convert.verify(out, reference=source, level="exact", on_event=lambda event: None).is_passed
