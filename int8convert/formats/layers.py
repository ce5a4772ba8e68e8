"""Which layers hold a matrix that int8 loaders replace: Linear, its subclasses, and GPT-2's Conv1D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})

_CONV1D_MODEL_TYPES = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Model types with Conv1D layers in transformers 5.23; a test reads its source for others."""

_CONV1D_CLASS = ("transformers.pytorch_utils", "Conv1D")


def is_linear(module: Any) -> bool:
    """Return whether a torch module is a Linear or of a subclass."""
    from torch import nn

    return isinstance(module, nn.Linear)


def is_plain_linear(module: Any) -> bool:
    """Return whether a torch module is a Linear and of no subclass."""
    from torch import nn

    return type(module) is nn.Linear


def is_conv1d_layer(module: Any) -> bool:
    """Return whether a torch module is transformers' Conv1D, whose weight is [in, out]. Imports nothing."""
    return any((base.__module__, base.__qualname__) == _CONV1D_CLASS for base in type(module).__mro__)


def features_of(module: Any) -> tuple[int, int] | None:
    """Return how many features a Linear layer, or GPT-2's Conv1D, reads and writes; None for other modules."""
    if is_linear(module):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if is_conv1d_layer(module) else None


def is_conv1d(module_name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a module is a Conv1D, by its name and the model's type in config.json.

    Does not know models whose code is not transformers'.
    """
    return module_name.rpartition(".")[2] in CONV1D_NAMES and not _CONV1D_MODEL_TYPES.isdisjoint(_model_types(config))


def _model_types(value: Any) -> Iterator[str]:
    """Yield the types of a model and of the models it is composed of."""
    if isinstance(value, dict):
        if isinstance(value.get("model_type"), str):
            yield value["model_type"]
        for part in value.values():
            yield from _model_types(part)
