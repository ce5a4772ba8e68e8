"""Reference and int8 model side by side, both in memory: every window through both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.checkpoint.source import open_source
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.evaluation.arithmetic import running
from int8convert.evaluation.comparison import Comparison, Measured, check_vocabulary, decoder_layers, hidden_state
from int8convert.evaluation.memory import resident_bytes
from int8convert.evaluation.models import check_length, load_model, read_config
from int8convert.evaluation.progress import ProgressHandler, Steps
from int8convert.evaluation.windows import TokenWindows
from int8convert.runtime.load import load

_BLOCKS_BYTES = 300_000_000
"""What is alive at a time of the statistics' blocks in float64, and of the allocator's leftovers."""


def bytes_in_memory(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    windows: TokenWindows,
    device: str,
    trusts_code: bool,
) -> int:
    """What both models and one window on its way through them take: an estimate from the files' headers."""
    models = sum(stored_bytes(tensor, device) for shard in open_source(reference).shards for tensor in shard.tensors)
    models += sum(tensor.n_bytes for shard in open_source(out).shards for tensor in shard.tensors)
    text = read_config(reference, trusts_code).get_text_config()
    floats = (text.num_hidden_layers + 16) * text.hidden_size + 3 * text.vocab_size
    return models + 4 * windows.ids.shape[1] * int(floats) + _BLOCKS_BYTES


def stored_bytes(tensor: StoredTensor, device: str) -> int:
    """What a tensor of the reference takes in memory: on the CPU it is held in float32."""
    is_float = tensor.dtype.startswith(("F", "BF"))
    return tensor.n_elements * (4 if is_float and device == "cpu" else DTYPE_BYTES[tensor.dtype])


def compare_in_memory(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    windows: TokenWindows,
    start_comparisons: Callable[[nn.Module], list[Comparison]],
    device: str,
    trusts_code: bool,
    on_progress: ProgressHandler | None,
) -> Measured:
    """Run all windows through both models.

    Args:
        start_comparisons: for the int8 model, once it is loaded.
    """
    planned = resident_bytes() + bytes_in_memory(reference, out, windows, device, trusts_code)
    steps = Steps(on_progress, streamed=False, peak_memory_bytes=planned, n_steps=len(windows.ids))
    steps.start()
    exact = load_model(reference, device, trust_remote_code=trusts_code)
    check_length(exact, windows)
    int8 = load(out, device_map={"": device}, trust_remote_code=trusts_code)
    comparisons = start_comparisons(int8)
    layers, int8_layers = decoder_layers(exact), decoder_layers(int8)
    for i, ids in enumerate(windows.ids):
        with _recording(layers) as states:
            exact_logits = _logits(exact, ids)
        scored = slice(windows.first_scored[i] - 1 if windows.first_scored else 0, -1)
        targets = ids[1:][scored.start :]
        for comparison in comparisons:
            with running(int8, comparison.arithmetic, comparison.columns), _comparing(int8_layers, states, comparison):
                logits = _logits(int8, ids)
            check_vocabulary(logits, exact_logits)
            comparison.statistics.add(logits[scored], exact_logits[scored], targets)
        steps.finish("window")
    return Measured(tuple(comparisons), int8.dtype, exact.dtype)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[positions, vocabulary]."""
    logits: torch.Tensor = model(ids[None].to(model.device), use_cache=False).logits[0]
    return logits


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """What decoder layers pass on while this lasts."""
    states: dict[str, torch.Tensor] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        states[name] = hidden_state(output).detach()

    with _hooked(layers, record):
        yield states


@contextmanager
def _comparing(
    layers: Mapping[str, nn.Module], states: Mapping[str, torch.Tensor], comparison: Comparison
) -> Iterator[None]:
    """Compare what decoder layers pass on with what was recorded, while this lasts."""

    def compare(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        comparison.add_layer(name, hidden_state(output), states[name])

    with _hooked(layers, compare):
        yield


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
