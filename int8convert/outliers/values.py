"""Quartiles of outlier values, from a histogram for each column that has any: memory does not grow with the text.

A value's bin is its sign and the logarithm of its magnitude, in sixteenths of an octave from the threshold up, so that
a quartile is right to about 2 %. Values of 4,096 times the threshold and more share the last bin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MAX_COLUMNS = 256
"""Of one input. Where more columns have outliers, those that came first, and of one batch those with most of them."""

_BINS_PER_OCTAVE = 16
_N_BINS = 12 * _BINS_PER_OCTAVE


class OutlierValues:
    """The outlier values of one layer's input.

    Attributes:
        threshold: magnitude from which a value counts.
        counts: column -> int64 [2, bins]: its values below zero and above, from the threshold outwards.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.counts: dict[int, torch.Tensor] = {}

    def add(self, x: torch.Tensor) -> None:
        """Count the values of tokens x [..., in]; NaN is left out."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        n_reached = (x.abs() >= self.threshold).sum(0)
        columns = n_reached.nonzero().flatten()
        for k in columns[n_reached[columns].argsort(descending=True, stable=True)].tolist():
            if k in self.counts or len(self.counts) < MAX_COLUMNS:
                self.counts[k] = self.counts.get(k, 0) + self._histogram(x[:, k])

    def _histogram(self, values: torch.Tensor) -> torch.Tensor:
        values = values[values.abs() >= self.threshold].cpu()
        bins = ((values.abs() / self.threshold).log2() * _BINS_PER_OCTAVE).floor().clamp(0, _N_BINS - 1).long()
        return torch.bincount((values > 0) * _N_BINS + bins, minlength=2 * _N_BINS).view(2, _N_BINS)


def quartiles(counts: torch.Tensor, threshold: float) -> tuple[float, float, float]:
    """First quartile, median and third quartile of what a histogram counted, each the middle of its bin.

    Args:
        counts: int64 [2, bins] as in `OutlierValues`, of at least one value; those of several columns may be added.
        threshold: of that histogram.
    """
    middles = threshold * 2 ** ((torch.arange(_N_BINS) + 0.5) / _BINS_PER_OCTAVE)
    values = torch.cat((-middles.flip(0), middles))
    below = torch.cat((counts[0].flip(0), counts[1])).cumsum(0)
    places = [int((below >= share * int(below[-1])).nonzero()[0]) for share in (0.25, 0.5, 0.75)]
    first, median, third = values[places].tolist()
    return first, median, third


@contextmanager
def watching_values(layers: Mapping[str, nn.Module], threshold: float) -> Iterator[dict[str, OutlierValues]]:
    """Gather the outlier values that these layers read, by the names given, as long as this lasts."""
    found = {name: OutlierValues(threshold) for name in layers}

    def counting(values: OutlierValues) -> Any:
        def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
            values.add((*inputs, *named.values())[0])

        return before

    hooks = [
        module.register_forward_pre_hook(counting(found[name]), with_kwargs=True) for name, module in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
