"""FP8 checkpoints made of plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.tools.tiny_models import read_tensors

BLOCK = 32


def to_fp8(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale, and the float32 weights they stand for, as torch computes them."""
    rows, columns = weight.shape
    if kind == "block":
        tiles = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = tiles.abs().amax((1, 3)) / 448
        full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    elif kind == "row":
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        full = scale
    else:
        scale = weight.float().abs().max() / 448
        full = scale
    codes = (weight.float() / full).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * full


def save_fp8(plain: Path, directory: Path, kind: str, two_shards: bool = True) -> dict[str, torch.Tensor]:
    """Write the FP8 form of a checkpoint, scales and codes in different shards; the weights it stands for."""
    directory.mkdir()
    weights: dict[str, torch.Tensor] = {}
    shards: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    suffix = "_scale_inv" if kind == "block" else "_scale"
    for name, tensor in read_tensors(plain).items():
        if "_proj.weight" in name:
            codes, scale, weights[name] = to_fp8(tensor, kind)
            shards[0][name] = codes
            shards[1 if two_shards else 0][name + suffix] = scale
        else:
            shards[1][name] = weights[name] = tensor
    files = {"model-00001-of-00002.safetensors": shards[0], "model-00002-of-00002.safetensors": shards[1]}
    for file_name, tensors in files.items():
        save_file(tensors, directory / file_name, {"format": "pt"})
    weight_map = {name: file_name for file_name, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if kind == "block":
        config["quantization_config"]["weight_block_size"] = [BLOCK, BLOCK]
    (directory / "config.json").write_text(json.dumps(config))
    return weights
