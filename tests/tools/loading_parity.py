"""What transformers says of a checkpoint when it loads it, beside what the plan says of it.

Each variant of a checkpoint is the whole one with one thing spoiled. `loading_info` is transformers' own answer; where
it raises, because tensors do not fit together, nothing is compared but that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from int8convert.formats.format import Format
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.sources import open_source
from tests.conftest import InProcessMap

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Said:
    """The three lists, as transformers and the plan have them."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]


def variants(model: Any, tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """The whole checkpoint, and it with one thing spoiled; what the model has not is left out."""
    linear = _key(model, tensors, lambda module: isinstance(module, nn.Linear))
    norm = _key(model, tensors, lambda module: "Norm" in type(module).__name__)
    yield "whole", tensors
    yield "extra", {**tensors, "some.extra.weight": torch.ones(2, 3)}
    if any(name.endswith("rotary_emb.inv_freq") for name, _ in model.named_buffers()):
        yield "old buffer", {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for what, key in (("linear", linear), ("norm", norm)):
        if key is not None:
            yield f"no {what}", {name: tensor for name, tensor in tensors.items() if name != key}
            yield f"wide {what}", {**tensors, key: torch.cat([tensors[key], tensors[key][:1]])}
    expert = next((name for name in tensors if ".experts." in name), None)
    if expert is not None:
        yield "no expert", {name: tensor for name, tensor in tensors.items() if name != expert}
        yield "wide expert", {**tensors, expert: torch.cat([tensors[expert], tensors[expert][:1]])}


def _key(model: Any, tensors: Tensors, is_kind: Callable[[nn.Module], bool]) -> str | None:
    """The last tensor that is such a module's weight, by the end of its name: files may use older beginnings."""
    tails = {".".join([*name.split(".")[-2:], "weight"]) for name, module in model.named_modules() if is_kind(module)}
    return next((key for key in reversed(tensors) if ".".join(key.split(".")[-3:]) in tails), None)


def write(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def read(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


def transformers_says(model_class: Any, directory: Path) -> Said | None:
    """None where it raises: the conversion of some tensors failed."""
    try:
        _, info = model_class.from_pretrained(directory, output_loading_info=True, ignore_mismatched_sizes=True)
    except RuntimeError:
        return None
    mismatched = (name for name, _, _ in info["mismatched_keys"])
    return Said(frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), frozenset(mismatched))


def plan_says(directory: Path) -> Said:
    """By the format that every family has."""
    needs = InProcessMap(open_source(directory), ModuleFilter(output_format=Format.COMPRESSED_TENSORS)).result().needs
    assert needs is not None
    return Said(frozenset(needs.missing), frozenset(needs.unexpected), frozenset(needs.mismatched))
