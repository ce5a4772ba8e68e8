"""Plans the memory of a comparison: with both models in memory, and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from int8convert.runtime.layered.layer_runner import LOGITS_AT_A_TIME
from int8convert.runtime.layered.memory import CODE_BYTES, are_in_files, part_bytes, working_bytes
from int8convert.runtime.memory import float_bytes, resident_bytes
from int8convert.runtime.models import read_config
from int8convert.sources import open_source
from int8convert.verification.fidelity.comparison import FidelityTask
from int8convert.verification.fidelity.paired_statistics import BLOCK_ELEMENTS


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
    in_files = are_in_files(states)
    reference = part_bytes(task.reference, lambda tensor: float_bytes(tensor, task.device))
    int8 = part_bytes(task.out, lambda tensor: tensor.n_bytes)
    parts = reference.rest + int8.rest + max(reference.layer, int8.layer)
    peak = resident_bytes() + parts + _working_bytes(task) + (0 if in_files else states)
    return StreamPlan(peak, int(config.num_hidden_layers), in_files)


def _working_bytes(task: FidelityTask) -> int:
    """Return the memory of one window inside one layer, and of one block of logits with its statistics."""
    config = read_config(task.reference, task.trusts_code)
    length = task.windows.ids.shape[1]
    n_logits = length * int(config.get_text_config().vocab_size)
    logits = 6 * 8 * min(BLOCK_ELEMENTS, n_logits) + 4 * 4 * min(LOGITS_AT_A_TIME, n_logits)
    return working_bytes(config, 1, length) + logits + CODE_BYTES
