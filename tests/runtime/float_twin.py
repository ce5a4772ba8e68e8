"""A float model that computes with the very weights an int8 one stands for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from int8convert.runtime.attention import Int8MultiheadAttention
from int8convert.runtime.linear import Int8Linear


def int8_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


def float_twin(model: Any, int8_model: nn.Module) -> Any:
    """A copy of the float model an int8 one was made of, with the weights that one's codes stand for."""
    twin = copy.deepcopy(model)
    for name, module in int8_model.named_modules():
        target = twin.get_submodule(name) if _has(twin, name) else None
        if isinstance(module, Int8MultiheadAttention):
            parts = [p.dequantize() for p in (module.q_proj, module.k_proj, module.v_proj)]
            target.in_proj_weight.data = torch.cat(parts).to(target.in_proj_weight.dtype)
        elif isinstance(module, Int8Linear) and target is not None:
            weight = module.dequantize().to(target.weight.dtype)
            target.weight.data = weight.T.contiguous() if isinstance(target, Conv1D) else weight
    return twin


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


@contextmanager
def exact_products() -> Iterator[None]:
    """Int8 layers that round their weights and nothing else, so that all but rounding is seen."""
    forward = Int8Linear.forward
    Int8Linear.forward = lambda self, x: functional.linear(x, self.dequantize(x.dtype), self.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Int8Linear.forward = forward  # type: ignore[method-assign]
