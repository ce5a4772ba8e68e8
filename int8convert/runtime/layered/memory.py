"""Plans the memory of running a model layer by layer, from names and shapes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.runtime.memory import available_bytes
from int8convert.runtime.pretrained import model_class
from int8convert.sources import open_source

CODE_BYTES = 200_000_000
"""Bytes for imports, compilation and the allocator in the first measurement: 134 MB measured on Linux x86-64, Python
3.11, torch 2.13, transformers 5.23."""

_STATES_SHARE = 0.25
"""Share of the available memory that hidden states may take; larger ones go into files."""

_LAYER = re.compile(r"(?:.*?\.)??(\d+)\.")


@dataclass(frozen=True, slots=True)
class PartBytes:
    """The memory of a model's parts.

    Attributes:
        rest: bytes outside of the decoder layers.
        layer: the most bytes for one layer while it is loaded.
    """

    rest: int
    layer: int


def part_bytes(path: str | os.PathLike[str], loaded_bytes: Callable[[StoredTensor], int]) -> PartBytes:
    """Return the memory of the parts of a checkpoint's model.

    Args:
        loaded_bytes: returns the memory of a tensor after loading.
    """
    rest, held = 0, Counter({0: 0})
    for tensor in open_source(path).tensors:
        layer = _LAYER.match(tensor.name)
        n_bytes = loaded_bytes(tensor)
        if layer is None:
            rest += n_bytes
        else:
            # Tensors before the change of dtype, or before they are joined, come on top.
            held[int(layer[1])] += n_bytes + max(tensor.n_bytes, n_bytes if _is_of_expert(tensor.name) else 0)
    return PartBytes(rest, max(held.values()))


def _is_of_expert(name: str) -> bool:
    return len(re.findall(r"\.\d+(?=\.)", f".{name}")) > 1


def working_bytes(config: Any, n_windows: int, length: int) -> int:
    """Return the memory of windows that run through one layer together.

    A layer holds inputs, inner features and a mask, and all attention scores if the model has no SDPA.
    """
    text = config.get_text_config()
    n_heads = getattr(text, "num_attention_heads", 0)  # a state-space model has none
    n_score_tables = 2 if getattr(model_class(config), "_supports_sdpa", False) else 3 * n_heads
    return 4 * n_windows * length * (32 * int(getattr(text, "hidden_size", 0)) + length * int(n_score_tables))


def are_in_files(states_bytes: int) -> bool:
    """Return whether hidden states of this size go into files."""
    return states_bytes > _STATES_SHARE * available_bytes("cpu")
