"""Column statistics of the inputs of Linear layers, gathered while text runs through the model.

1. `watching` puts a hook on each layer; each batch of tokens that passes is added to the layer's sums.
2. Memory does not grow with the text: a few numbers for each input and output feature, and on request a histogram for
   each column that has outliers.

Sums stay on the layer's device until the end. Layers that read the same tensor share the sums over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from cuda_kernels.reference import N_STEPS
from int8convert.formats.layers import features_of
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import BLOCK_SIZE

MAX_COLUMNS = 256
"""Columns of one input that get a histogram: those that have outliers first, in one batch those with most of them."""

_BINS_PER_OCTAVE = 16
_N_BINS = 12 * _BINS_PER_OCTAVE
_ELEMENTS_AT_A_TIME = 1 << 22
"""Elements of a batch whose outlier columns are found at a time: 16 MB in float32."""

_CACHED_ELEMENTS = 1 << 18
"""Elements that are added up at a time: 1 MB in float32, which stays in a processor's cache from sum to sum."""


class OutlierValues:
    """Histograms of the outlier values of one layer's input.

    A value's bin is its sign and the logarithm of its magnitude, in sixteenths of an octave from the threshold up, so
    quartiles are right to about 2 %. Values of 4,096 times the threshold and more share the last bin.

    Attributes:
        threshold: magnitude from which a value counts.
        counts: column -> int64 [2, bins], values below zero and above, from the threshold outwards.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.counts: dict[int, torch.Tensor] = {}

    def add(self, x: torch.Tensor) -> None:
        """Count the values of tokens x [..., in], without NaN."""
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
    """Return first quartile, median and third quartile of a histogram, each the middle of its bin.

    Args:
        counts: int64 [2, bins] as in `OutlierValues`, of at least one value; several columns may be added up.
        threshold: the threshold of that histogram.
    """
    middles = threshold * 2 ** ((torch.arange(_N_BINS) + 0.5) / _BINS_PER_OCTAVE)
    values = torch.cat((-middles.flip(0), middles))
    below = torch.cat((counts[0].flip(0), counts[1])).cumsum(0)
    places = [int((below >= share * int(below[-1])).nonzero()[0]) for share in (0.25, 0.5, 0.75)]
    first, median, third = values[places].tolist()
    return first, median, third


class InputSums:
    """Sums over the tokens x [tokens, in] of a layer's input. NaN counts as infinitely large.

    Attributes:
        threshold: magnitude from which a value is an outlier, in the units of x.
        n_tokens: number of tokens.
        maximum, minimum: float32 [in].
        n_above, n_below: int64 [in], tokens with x >= threshold, and with x <= -threshold.
        sum_squares: float64 [in], of x.
        step_squares: float64 [], the sum over tokens of (x_absmax / 127)^2 without outlier columns: those that reach
            the threshold at any token of the same part of a batch.
        block_step_squares: float64 [blocks of 128 columns], the sum over tokens of (block_absmax / 127)^2, all columns
            included.
    """

    def __init__(self, in_features: int, threshold: float, device: torch.device) -> None:
        self.threshold = threshold
        self.n_tokens = 0
        self.maximum = torch.full((in_features,), -torch.inf, device=device)
        self.minimum = torch.full((in_features,), torch.inf, device=device)
        self.n_above = torch.zeros(in_features, dtype=torch.int64, device=device)
        self.n_below = torch.zeros_like(self.n_above)
        self.sum_squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.step_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.block_step_squares = torch.zeros(-(-in_features // BLOCK_SIZE), dtype=torch.float64, device=device)

    def add_tokens(self, x: torch.Tensor) -> None:
        """Count the tokens x [tokens, in]."""
        self.n_tokens += x.shape[0]
        for part in x.split(max(1, _ELEMENTS_AT_A_TIME // max(1, x.shape[1]))):
            if part.numel():  # an expert may get no token
                self._add_part(part.float())

    def _add_part(self, x: torch.Tensor) -> None:
        maximum, minimum = x.amax(0), x.amin(0)
        if bool(maximum.isnan().any()):
            x = x.nan_to_num(torch.inf, torch.inf, -torch.inf)
            maximum, minimum = x.amax(0), x.amin(0)
        self.maximum = torch.maximum(self.maximum, maximum)
        self.minimum = torch.minimum(self.minimum, minimum)
        reached = ((maximum >= self.threshold) | (minimum <= -self.threshold)).nonzero().flatten()
        self.n_above[reached] += (x[:, reached] >= self.threshold).sum(0)
        self.n_below[reached] += (x[:, reached] <= -self.threshold).sum(0)
        for rows in x.split(max(1, _CACHED_ELEMENTS // x.shape[1])):
            self.sum_squares += rows.square().sum(0)
            magnitude = rows.abs()
            by_block = blocks_of(magnitude).amax(-1)
            self.block_step_squares += (by_block / N_STEPS).square().sum(0, dtype=torch.float64)
            largest = magnitude.index_fill_(1, reached, 0).amax(1) if len(reached) else by_block.amax(1)
            self.step_squares += (largest / N_STEPS).square().sum(dtype=torch.float64)

    def merge(self, other: InputSums) -> None:
        """Count the tokens of `other`, too."""
        self.n_tokens += other.n_tokens
        self.maximum = torch.maximum(self.maximum, other.maximum)
        self.minimum = torch.minimum(self.minimum, other.minimum)
        for name in ("n_above", "n_below", "sum_squares", "step_squares", "block_step_squares"):
            getattr(self, name).add_(getattr(other, name))


class InputStatistics(InputSums):
    """Sums over the tokens of one layer y = x W^T + b.

    Attributes:
        output_sum, output_squares: float64 [out] and [], of y and of y^2.
        values: histograms of the outlier values of x; None if they were not asked for.

    All others are those of `InputSums`.
    """

    def __init__(self, in_features: int, out_features: int, threshold: float, device: torch.device) -> None:
        super().__init__(in_features, threshold, device)
        self.output_sum = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.output_squares = torch.zeros((), dtype=torch.float64, device=device)
        self.values: OutlierValues | None = None

    def add_outputs(self, y: torch.Tensor) -> None:
        """Count the outputs y [tokens, out]."""
        for rows in y.split(max(1, _CACHED_ELEMENTS // max(1, y.shape[1]))):
            values = rows.float()
            self.output_sum += values.sum(0)
            self.output_squares += torch.linalg.vector_norm(values, dim=1).double().square().sum()

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """All tensors by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def to_cpu(self) -> None:
        for name, value in self.sums.items():
            setattr(self, name, value.cpu())

    @property
    def largest(self) -> torch.Tensor:
        """float32 [in], the largest magnitude; 0 if no token came."""
        return torch.maximum(self.maximum, -self.minimum).clamp_min(0)

    @property
    def n_reached(self) -> torch.Tensor:
        """int64 [in], the tokens at which each column reached the threshold."""
        return self.n_above + self.n_below

    @property
    def share(self) -> torch.Tensor:
        """float64 [in], the share of tokens that reached the threshold, 0 to 1."""
        return self.n_reached.double() / max(1, self.n_tokens)

    @property
    def output_variance(self) -> float:
        """The sum of the variances of the output features."""
        n = max(1, self.n_tokens)
        return float(self.output_squares / n - (self.output_sum / n).square().sum())


def blocks_of(values: torch.Tensor) -> torch.Tensor:
    """Return [..., blocks, 128] of [..., in], with zeros after the last column."""
    padded: torch.Tensor = nn.functional.pad(values, (0, -values.shape[-1] % BLOCK_SIZE))
    return padded.view(*values.shape[:-1], -1, BLOCK_SIZE)


def version_of(x: torch.Tensor) -> int:
    """Return a number that differs after each change of a tensor in place; always 0 in inference mode."""
    return 0 if x.is_inference() else x._version


@contextmanager
def watching(
    layers: Mapping[str, nn.Module],
    threshold: float,
    *,
    with_values: bool = False,
    on_input: Callable[[str, torch.Tensor], None] | None = None,
) -> Iterator[dict[str, InputStatistics]]:
    """Gather statistics of layers by the names given, until the context ends.

    Args:
        layers: modules that are no Linear layer are left out.
        with_values: also make histograms of outlier values.
        on_input: receives a layer's name and input whenever it has run.
    """
    found: dict[str, InputStatistics] = {}
    sums = WeakTensorKeyDictionary()
    with ExitStack() as hooks:
        for name, module in layers.items():
            features = features_of(module)
            if features is not None:
                device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
                found[name] = InputStatistics(*features, threshold, device)
                found[name].values = OutlierValues(threshold) if with_values else None
                after = partial(_add, name, found[name], sums, on_input)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield found
    for statistics in found.values():
        statistics.to_cpu()


def _add(
    name: str,
    statistics: InputStatistics,
    sums: MutableMapping[torch.Tensor, tuple[int, InputSums]],
    on_input: Callable[[str, torch.Tensor], None] | None,
    module: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    named: dict[str, torch.Tensor],
    y: Any,
) -> None:
    if not isinstance(y, torch.Tensor):  # of a router that is a kind of Linear layer
        return
    x = (*inputs, *named.values())[0]
    x = module.rotate_input(x) if isinstance(module, Int8Linear) else x
    tokens = x.detach().reshape(-1, x.shape[-1])
    version, of_input = sums.get(x, (-1, None))
    if of_input is None or version != version_of(x):
        of_input = InputSums(tokens.shape[1], statistics.threshold, tokens.device)
        of_input.add_tokens(tokens)
        sums[x] = version_of(x), of_input
    statistics.merge(of_input)
    statistics.add_outputs(y.detach().reshape(-1, y.shape[-1]))
    if statistics.values is not None:
        statistics.values.add(tokens)
    if on_input is not None:
        on_input(name, x)
