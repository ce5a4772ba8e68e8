"""Plans the memory of a comparison: with both models in memory, and layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from int8convert.runtime.layered.layer_runner import LOGITS_AT_A_TIME
from int8convert.runtime.memory import available_bytes, float_bytes, resident_bytes
from int8convert.runtime.models import read_config
from int8convert.runtime.pretrained import model_class
from int8convert.sources import open_source
from int8convert.verification.fidelity.comparison import FidelityTask
from int8convert.verification.fidelity.paired_statistics import BLOCK_ELEMENTS

_STATES_SHARE = 0.25
"""Share of the available memory that hidden states may take; larger ones go into files."""

_LAYER = re.compile(r"(?:.*?\.)??(\d+)\.")


_CODE_BYTES = 200_000_000
"""Bytes for imports, compilation and the allocator in the first measurement: 134 MB measured on Linux x86-64, Python
3.11, torch 2.13, transformers 5.23."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """A comparison layer by layer.

    Attributes:
        peak_bytes: the most memory that will be resident in this process.
        n_layers: decoder layers of the model.
        states_in_files: whether hidden states go into files.
    """

    peak_bytes: int
    n_layers: int
    states_in_files: bool


def bytes_in_memory(task: FidelityTask) -> int:
    """Return the memory for both models and one window."""
    text = read_config(task.reference, task.trusts_code).get_text_config()
    window = 4 * task.windows.ids.shape[1] * (text.num_hidden_layers * text.hidden_size + 2 * text.vocab_size)
    models = sum(float_bytes(tensor, task.device) for tensor in open_source(task.reference).tensors)
    models += sum(tensor.n_bytes for tensor in open_source(task.out).tensors)
    return models + int(window) + _working_bytes(task)


def plan_stream(task: FidelityTask) -> StreamPlan:
    """Plan the memory of a comparison layer by layer, from names and shapes."""
    config = read_config(task.reference, task.trusts_code).get_text_config()
    states = 4 * (1 + task.n_arithmetics) * task.windows.ids.numel() * config.hidden_size
    in_files = states > _STATES_SHARE * available_bytes("cpu")
    rest, layers = 0, [0]
    for path, is_reference in ((task.reference, True), (task.out, False)):
        held: Counter[int] = Counter()
        for tensor in open_source(path).tensors:
            layer = _LAYER.match(tensor.name)
            n_bytes = float_bytes(tensor, task.device) if is_reference else tensor.n_bytes
            if layer is None:
                rest += n_bytes
            else:
                # Tensors before the change of dtype, or before they are joined, come on top.
                held[int(layer[1])] += n_bytes + max(tensor.n_bytes, n_bytes if _is_of_expert(tensor.name) else 0)
        layers += held.values()
    peak = resident_bytes() + rest + max(layers) + _working_bytes(task) + (0 if in_files else states)
    return StreamPlan(peak, int(config.num_hidden_layers), in_files)


def _is_of_expert(name: str) -> bool:
    return len(re.findall(r"\.\d+(?=\.)", f".{name}")) > 1


def _working_bytes(task: FidelityTask) -> int:
    """Return the memory of one window inside one layer, and of one block of logits with its statistics.

    A layer holds inputs, inner features and a mask, and all attention scores if the model has no SDPA.
    """
    whole = read_config(task.reference, task.trusts_code)
    config = whole.get_text_config()
    length = task.windows.ids.shape[1]
    n_score_tables = 2 if getattr(model_class(whole), "_supports_sdpa", False) else 3 * config.num_attention_heads
    layer = 4 * length * (32 * int(config.hidden_size) + length * int(n_score_tables))
    n_logits = length * int(config.vocab_size)
    return layer + 6 * 8 * min(BLOCK_ELEMENTS, n_logits) + 4 * 4 * min(LOGITS_AT_A_TIME, n_logits) + _CODE_BYTES
