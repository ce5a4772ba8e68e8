"""Linear layers that stay in 16 bits, at the speed of memory for few tokens on a CPU.

On one thread of an AMD EPYC torch takes 2.8 times as long for one token of a bfloat16 head of 152,000 words.
"""

from __future__ import annotations

import torch
from torch import nn

_MAX_TOKENS = 4
"""Tokens, at most, for which reading the weight takes longer than the products. torch is as fast for more."""


class FloatLinear(nn.Linear):
    """An nn.Linear that is faster for few tokens in 16 bits on a CPU.

    Its outputs for them differ from torch's only in the order in which products are added.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [..., out_features] for x [..., in_features]."""
        if not torch.compiler.is_compiling() and _is_slow(input, self.weight, self.bias):
            from cuda_kernels import ops
            from cuda_kernels.cpu.team import ALONE, team
            from cuda_kernels.cpu.tensors import float_linear

            n_threads = torch.get_num_threads()
            if ops.is_plain(input, self.weight, self.bias) and (n_threads == 1 or team(n_threads) != ALONE):
                n_rows, n_columns = self.weight.shape
                y = float_linear(input.reshape(input.numel() // n_columns, n_columns), self.weight, self.bias)
                return y.view(*input.shape[:-1], n_rows)
        return super().forward(input)


def _is_slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether torch would be slower: few tokens, in 16 bits, on a CPU."""
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == weight.dtype
        and weight.dim() == 2
        and weight.shape[1] > 0
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() <= _MAX_TOKENS * weight.shape[1]
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1]))
        and not torch.is_autocast_enabled("cpu")
    )


def hasten(model: nn.Module) -> None:
    """Make the nn.Linear layers of a model FloatLinear, but those with hooks of accelerate or another `forward`."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and not hasattr(module, "_hf_hook"):
            module.__class__ = FloatLinear


def restore(model: nn.Module) -> None:
    """Undo `hasten`."""
    for module in model.modules():
        if type(module) is FloatLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
