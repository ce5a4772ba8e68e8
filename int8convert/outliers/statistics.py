"""What the inputs of Linear layers are like, column by column, gathered while text runs through the model.

1. `watching` puts a hook on each layer; each batch of tokens that passes is added to the layer's sums.
2. The sums are a few numbers for each input and output feature, so their memory does not grow with the text. The tokens
   of a batch are taken a few at a time, so that neither does that of the hooks.

Everything stays on the layer's device; nothing is read back while the model runs. Afterwards all is on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import N_STEPS

_ELEMENTS_AT_A_TIME = 1 << 22
"""Of a batch: 16 MB in float32."""


class InputStatistics:
    """Sums over all tokens that one layer has read.

    NaN counts as infinitely large. Does not know the order of the tokens, nor what was in between minimum and maximum.

    Attributes:
        threshold: magnitude from which a value counts as an outlier, in the units of x.
        n_tokens: how many there were.
        maximum, minimum: float32 [in].
        n_above, n_below: int64 [in], tokens with x >= threshold, and with x <= -threshold.
        sum_squares: float64 [in], of x.
        step_squares: float64 [], the sum over tokens of (x_absmax / 127)^2, outlier columns left out: those that reach
            the threshold at any of the tokens taken together.
        output_sum, output_squares: float64 [out] and [], of y and of y^2.
    """

    def __init__(self, in_features: int, out_features: int, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.n_tokens = 0
        self.maximum = torch.full((in_features,), -torch.inf, device=device)
        self.minimum = torch.full((in_features,), torch.inf, device=device)
        self.n_above = torch.zeros(in_features, dtype=torch.int64, device=device)
        self.n_below = torch.zeros_like(self.n_above)
        self.sum_squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.step_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.output_sum = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.output_squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count the tokens x [..., in] and what the layer made of them, y [..., out]."""
        x, y = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        self.n_tokens += x.shape[0]
        n = max(1, _ELEMENTS_AT_A_TIME // max(1, x.shape[1], y.shape[1]))
        for x_part, y_part in zip(x.split(n), y.split(n), strict=True):
            if x_part.numel():  # an expert that nobody chose
                self._add_inputs(x_part.float().nan_to_num(torch.inf, torch.inf, -torch.inf))
                self.output_sum += y_part.sum(0, dtype=torch.float64)
                self.output_squares += y_part.double().square().sum()

    def _add_inputs(self, x: torch.Tensor) -> None:
        self.maximum = torch.maximum(self.maximum, x.amax(0))
        self.minimum = torch.minimum(self.minimum, x.amin(0))
        self.n_above += (x >= self.threshold).sum(0)
        self.n_below += (x <= -self.threshold).sum(0)
        self.sum_squares += x.square().sum(0, dtype=torch.float64)
        magnitude = x.abs()
        ordinary = magnitude.where(magnitude.amax(0) < self.threshold, 0.0)
        self.step_squares += (ordinary.amax(1) / N_STEPS).square().sum(dtype=torch.float64)

    def to_cpu(self) -> None:
        """Move all sums."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.cpu())

    @property
    def largest(self) -> torch.Tensor:
        """float32 [in], the largest magnitude; 0 where no token came."""
        return torch.maximum(self.maximum, -self.minimum).clamp_min(0)

    @property
    def share(self) -> torch.Tensor:
        """float64 [in], the share of tokens that reached the threshold, 0 to 1."""
        return (self.n_above + self.n_below).double() / max(1, self.n_tokens)

    @property
    def output_variance(self) -> float:
        """The sum of the variances of the output features."""
        n = max(1, self.n_tokens)
        return float(self.output_squares / n - (self.output_sum / n).square().sum())


def features_of(module: Any) -> tuple[int, int] | None:
    """How many features a Linear layer, or GPT-2's Conv1D, reads and writes; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if type(module).__name__ == "Conv1D" else None


@contextmanager
def watching(layers: Mapping[str, nn.Module], threshold: float) -> Iterator[dict[str, InputStatistics]]:
    """Gather statistics of these layers, by the names given, as long as this lasts.

    Args:
        layers: of those that are no Linear layer nothing is gathered.
        threshold: see `InputStatistics`.
    """
    statistics = {}
    hooks = []
    for name, module in layers.items():
        features = features_of(module)
        if features is not None:
            device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
            statistics[name] = InputStatistics(*features, threshold, device)
            hooks.append(module.register_forward_hook(_adding_to(statistics[name]), with_kwargs=True))
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
        for gathered in statistics.values():
            gathered.to_cpu()


def _adding_to(statistics: InputStatistics) -> Any:
    def after(
        _module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor], y: torch.Tensor
    ) -> None:
        statistics.add((*inputs, *named.values())[0], y)

    return after
