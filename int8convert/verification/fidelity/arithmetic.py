"""Which arithmetic an int8 model runs: the same weights are different models under each.

    none            every column int8: vector-wise
    dynamic         LLM.int8(): columns that reach the threshold in this batch stay 16-bit, weights from the codes
    static          stored columns stay 16-bit, weights as they were
    static+guard    both
    weight-only     weights are what the codes stand for, inputs are not quantized at all

The first four are the modes of `int8convert.runtime.linear`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.errors import CoverageError, SourceError
from int8convert.runtime.linear import MAX_FOUND_COLUMNS, Int8Linear, OutlierMode

WEIGHT_ONLY = "weight-only"
MODES = (*OutlierMode, WEIGHT_ONLY)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How the int8 layers of a model compute.

    Attributes:
        mode: one of `MODES`.
        threshold: magnitude from which a column is an outlier, in the units of the inputs; 0 and infinity find none.
            None where the mode looks for none.
    """

    mode: str
    threshold: float | None

    @property
    def outlier_mode(self) -> OutlierMode | None:
        return None if self.mode == WEIGHT_ONLY else OutlierMode(self.mode)

    @property
    def uses_stored(self) -> bool:
        return self.outlier_mode is None or self.outlier_mode.uses_stored


@dataclass(slots=True)
class ColumnCount:
    """Columns of inputs that stayed 16-bit, of all that int8 layers read."""

    n_kept: int = 0
    n_columns: int = 0

    @property
    def share(self) -> float:
        """0 to 1; each layer counts by its columns, each time that it runs."""
        return self.n_kept / self.n_columns if self.n_columns else 0.0


def choose_arithmetics(model: nn.Module, modes: Sequence[str], thresholds: Sequence[float]) -> tuple[Arithmetic, ...]:
    """Each mode at each threshold, once; modes that look for no outliers have none.

    Args:
        model: as `int8convert.load` has it.
        modes: none for the model's own.
        thresholds: none for the model's own.

    Raises:
        CoverageError: the model has no int8 layer.
        SourceError: a mode uses stored columns, and the checkpoint has none.
        ValueError: there is no such mode, or a threshold is negative.
    """
    layer = next((module for module in model.modules() if isinstance(module, Int8Linear)), None)
    if layer is None:
        raise CoverageError(f"{type(model).__name__} has no int8 layer", "name the checkpoint that was converted")
    chosen = []
    for mode in modes or (layer.mode,):
        if mode not in MODES:
            raise ValueError(f"{mode!r} is none of {', '.join(MODES)}")
        finds = mode != WEIGHT_ONLY and OutlierMode(mode).finds
        for threshold in (thresholds or (layer.threshold,)) if finds else (None,):
            if threshold is not None and not threshold >= 0:
                raise ValueError(f"threshold {threshold} is negative")
            chosen.append(Arithmetic(str(mode), threshold))
    if not layer.mode.uses_stored and any(choice.uses_stored and choice.mode != WEIGHT_ONLY for choice in chosen):
        raise SourceError(
            "static outliers are asked for, and the checkpoint has no stored columns",
            "int8convert outliers SRC --write finds and stores them; mode dynamic needs none",
        )
    return tuple(dict.fromkeys(chosen))


@contextmanager
def running(model: nn.Module, arithmetic: Arithmetic, columns: ColumnCount) -> Iterator[None]:
    """Let the int8 layers of a model compute so as long as this lasts, and count the columns that stay 16-bit."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    before = [(layer.mode, layer.threshold) for layer in layers]
    hooks = [
        layer.register_forward_pre_hook(partial(_count, arithmetic, columns), with_kwargs=True) for layer in layers
    ]
    for layer in layers:
        if arithmetic.outlier_mode is None:
            layer.forward = partial(_weight_only, layer)  # type: ignore[method-assign]
        else:
            layer.mode = arithmetic.outlier_mode
        layer.threshold = layer.threshold if arithmetic.threshold is None else arithmetic.threshold
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, (mode, threshold) in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            layer.mode, layer.threshold = mode, threshold


def _weight_only(layer: Int8Linear, input: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(input, layer.dequantize(input.dtype), layer.bias)


def _count(
    arithmetic: Arithmetic,
    columns: ColumnCount,
    layer: Any,
    inputs: tuple[torch.Tensor, ...],
    named: Mapping[str, torch.Tensor],
) -> None:
    x = next(iter((*inputs, *named.values())))
    stored = layer.outlier_columns.long() if arithmetic.uses_stored else layer.outlier_columns[:0].long()
    columns.n_kept += stored.numel()
    columns.n_columns += layer.in_features
    if arithmetic.threshold and not math.isinf(arithmetic.threshold):
        is_found = x.reshape(-1, layer.in_features).abs().amax(0) >= arithmetic.threshold
        is_found[stored] = False
        columns.n_kept += min(int(is_found.sum()), MAX_FOUND_COLUMNS)
