"""Arithmetics of an int8 model: under each of them the same weights are a different model.

    weight-only     weights are dequantized, inputs are not quantized at all

and the modes of `int8convert.runtime.modes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from int8convert.errors import CoverageError, SourceError
from int8convert.runtime.linear import Int8Linear, max_found_columns
from int8convert.runtime.modes import OutlierMode

WEIGHT_ONLY = "weight-only"
MODES = (*OutlierMode, WEIGHT_ONLY)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How the int8 layers of a model compute.

    Attributes:
        mode: one of `MODES`.
        threshold: magnitude from which a column is an outlier, in the units of the inputs; 0 and infinity find none.
            None if the mode does not look for outliers.
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
    """Number of input columns of int8 layers, and of those that stayed 16-bit."""

    n_kept: int = 0
    n_columns: int = 0

    @property
    def share(self) -> float:
        """Share that stayed 16-bit, 0 to 1; a layer counts by its columns, each time it runs."""
        return self.n_kept / self.n_columns if self.n_columns else 0.0


def choose_arithmetics(model: nn.Module, modes: Sequence[str], thresholds: Sequence[float]) -> tuple[Arithmetic, ...]:
    """Return each mode at each threshold, once; a mode that looks for no outliers has no threshold.

    Args:
        model: a model that `int8convert.load` made.
        modes, thresholds: none for the model's own.

    Raises:
        CoverageError: the model has no int8 layer.
        SourceError: a mode uses stored columns, and the checkpoint has none.
        ValueError: a mode is unknown, or a threshold is negative.
    """
    layer = next((module for module in model.modules() if isinstance(module, Int8Linear)), None)
    if layer is None:
        raise CoverageError(
            f"{type(model).__name__} has no int8 layer", "give the int8 checkpoint that a conversion wrote"
        )
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
            "store columns with int8convert outliers SRC --write OUT, or use mode dynamic",
        )
    return tuple(dict.fromkeys(chosen))


@contextmanager
def running(model: nn.Module, arithmetic: Arithmetic, columns: ColumnCount) -> Iterator[None]:
    """Run the int8 layers of a model by an arithmetic until the context ends, and count columns that stay 16-bit."""
    with ExitStack() as stack:
        for layer in [module for module in model.modules() if isinstance(module, Int8Linear)]:
            stack.callback(_restore, layer, layer.mode, layer.threshold)
            hook = layer.register_forward_pre_hook(partial(_count, arithmetic, columns), with_kwargs=True)
            stack.callback(hook.remove)
            if arithmetic.outlier_mode is None:
                layer.forward = partial(_weight_only, layer)  # type: ignore[method-assign]
            else:
                layer.mode = arithmetic.outlier_mode
            layer.threshold = layer.threshold if arithmetic.threshold is None else arithmetic.threshold
        yield


def _restore(layer: Int8Linear, mode: OutlierMode, threshold: float) -> None:
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
    x = layer.rotate_input(next(iter((*inputs, *named.values()))))
    stored = layer.outlier_columns.long() if arithmetic.uses_stored else layer.outlier_columns[:0].long()
    columns.n_kept += stored.numel()
    columns.n_columns += layer.in_features
    if arithmetic.threshold and not math.isinf(arithmetic.threshold):
        is_found = x.reshape(-1, layer.in_features).abs().amax(0) >= arithmetic.threshold
        is_found[stored] = False
        columns.n_kept += min(int(is_found.sum()), max_found_columns(layer.in_features))
