"""Finds the decoder layers of a model, which pass on the hidden state one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from int8convert.errors import LayerwiseError

_HINT = "use verify --level exact, which runs no model"


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Return the layers that pass on the hidden state, by name: the largest list of modules that is in no other.

    Raises:
        LayerwiseError: the model has no such list, or does not predict the next token.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise LayerwiseError(f"{type(model).__name__} does not predict the next token", _HINT)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name: found for name, found in lists.items() if not _is_inside(name, lists)}
    if not outermost:
        raise LayerwiseError(f"{type(model).__name__} has no list of layers, one after the other", _HINT)
    largest = max(outermost, key=lambda name: sum(p.numel() for p in outermost[name].parameters()))
    return {f"{largest}.{i}": layer for i, layer in enumerate(outermost[largest])}


def _is_inside(name: str, others: dict[str, nn.ModuleList]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def hidden_state(output: Any) -> torch.Tensor:
    """Return the hidden state in the output of a decoder layer."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state
