"""Inputs and sums of a fidelity measurement, for both ways to run it: side by side and in lockstep."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from int8convert.errors import SourceError
from int8convert.events import EventSink
from int8convert.runtime.load import load
from int8convert.runtime.models import load_model, settle_dtype
from int8convert.runtime.text.windows import TokenWindows
from int8convert.verification.fidelity.arithmetic import Arithmetic, ColumnCount, choose_arithmetics
from int8convert.verification.fidelity.paired_statistics import PairedStatistics
from int8convert.verification.options import Execution


@dataclass(slots=True)
class Comparison:
    """Sums over all windows for one arithmetic of the int8 model."""

    arithmetic: Arithmetic
    statistics: PairedStatistics = field(default_factory=PairedStatistics)
    columns: ColumnCount = field(default_factory=ColumnCount)
    _squares: dict[str, list[float]] = field(default_factory=dict)

    def add_layer(self, name: str, output: torch.Tensor, reference: torch.Tensor) -> None:
        """Count the hidden state after a decoder layer of one window, all layers before it included."""
        squares = self._squares.setdefault(name, [0.0, 0.0])
        exact = reference.to(output.device, torch.float32)
        squares[0] += float(torch.linalg.vector_norm(output.float() - exact, dtype=torch.float64)) ** 2
        squares[1] += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2

    def layer_errors(self) -> tuple[tuple[str, float], ...]:
        """Return layer -> |output - reference| / |reference| over all tokens, in the order they ran."""
        return tuple((name, _ratio(*squares)) for name, squares in self._squares.items())


@dataclass(frozen=True, slots=True)
class FidelityTask:
    """The arguments of `measure_fidelity`, with a device that was chosen, and the loaders of both models."""

    reference: str | os.PathLike[str]
    out: str | os.PathLike[str]
    windows: TokenWindows
    execution: Execution
    trusts_code: bool
    on_event: EventSink

    @property
    def device(self) -> str:
        """The device that was chosen: "cpu" or "cuda[:n]"."""
        return self.execution.device

    @property
    def n_arithmetics(self) -> int:
        """The largest number of arithmetics."""
        return max(1, len(self.execution.modes)) * max(1, len(self.execution.thresholds))

    def load_reference(self) -> Any:
        return load_model(self.reference, self.device, trust_remote_code=self.trusts_code)

    def settle_reference(self, part: nn.Module) -> None:
        """Do to a part what loading the whole reference does to it."""
        settle_dtype(part, self.reference, self.device)

    def load_int8(self) -> Any:
        return load(self.out, device_map={"": self.device}, trust_remote_code=self.trusts_code)

    def start_comparisons(self, int8: nn.Module) -> tuple[Comparison, ...]:
        """Return a comparison for each arithmetic; errors as for `choose_arithmetics`."""
        return tuple(
            Comparison(choice) for choice in choose_arithmetics(int8, self.execution.modes, self.execution.thresholds)
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """All comparisons of a measurement.

    Attributes:
        dtype: dtype of the int8 model's other tensors.
        reference_dtype: dtype of the reference.
    """

    comparisons: tuple[Comparison, ...]
    dtype: torch.dtype
    reference_dtype: torch.dtype


def check_vocabulary(logits: torch.Tensor, reference: torch.Tensor) -> None:
    if logits.shape[-1] != reference.shape[-1]:
        raise SourceError(
            f"the int8 model predicts one of {logits.shape[-1]:,} tokens, the reference one of {reference.shape[-1]:,}",
            "give the source with --reference SRC",
        )


def _ratio(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / size) if size else math.inf
