"""Gathers the second moments of what layers read, and writes them to the disk when a decoder layer is done.

Costs memory for one float32 matrix [in, in] of each tensor that the layers of one decoder layer read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from int8convert.calibration.folder import CalibratedInput, Moments, write_moments
from int8convert.calibration.statistics import version_of

MAX_WIDTH = 16384
"""Most features of an input whose second moments are gathered: 1 GiB in float32."""

MAX_HELD_OUT = 1024
"""Most tokens that are held out."""


_BLOCK = 512
"""Rows of a second moment that are added up at a time."""


@dataclass(slots=True)
class _Input:
    """The tensor that some layers read.

    Attributes:
        second_moment: float32 [in, in]; None where it is not gathered.
        held_out: float32 [tokens, in] of each held-out batch, on the CPU.
    """

    in_features: int
    second_moment: torch.Tensor | None
    modules: list[str] = field(default_factory=list)
    n_tokens: int = 0
    held_out: list[torch.Tensor] = field(default_factory=list)


class InputRecorder:
    """Records which layers read the same tensor, and on request its second moments.

    Args:
        folder: the calibration folder; None gathers no second moments.

    Attributes:
        inputs: the inputs that are done.
        is_held_out: whether the windows that run now are held out.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._input_of: dict[str, _Input] = {}
        self._seen = WeakTensorKeyDictionary()
        self.inputs: list[CalibratedInput] = []
        self.is_held_out = False

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count the tokens x [..., in] that a layer reads, once for all layers that read the same tensor."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        if not len(tokens):  # an expert may get no token
            return
        known: _Input | None
        version, known = self._seen.get(x, (-1, None))
        known = known if version == version_of(x) else None
        found = self._input_of.get(name)
        if found is None:
            found = self._input_of[name] = known or self._begin(tokens)
            found.modules.append(name)
        if found is known:
            return
        self._seen[x] = version_of(x), found
        if self._folder is None or not self.is_held_out:
            found.n_tokens += len(tokens)
        if found.second_moment is None:
            return
        if self.is_held_out:
            found.held_out.append(tokens.float().cpu())
        else:
            _add_upper(found.second_moment, tokens.float())

    def _begin(self, tokens: torch.Tensor) -> _Input:
        width = tokens.shape[1]
        is_gathered = self._folder is not None and width <= MAX_WIDTH
        return _Input(width, torch.zeros(width, width, device=tokens.device) if is_gathered else None)

    def finish(self) -> None:
        """Write the second moments of all layers that ran since the last call, and forget them."""
        for found in {id(found): found for found in self._input_of.values()}.values():
            name = None
            if found.second_moment is not None and self._folder is not None:
                held_out = torch.cat([torch.empty(0, found.in_features), *found.held_out])[:MAX_HELD_OUT]
                _mirror(found.second_moment)
                moments = Moments(found.second_moment.cpu(), held_out)
                name = write_moments(self._folder, len(self.inputs), moments)
                found.second_moment = None
            self.inputs.append(CalibratedInput(tuple(found.modules), found.in_features, found.n_tokens, name))
        self._input_of.clear()


def _add_upper(moment: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to blocks on and above the diagonal: half of the work, for the rest is its mirror image."""
    for begin in range(0, len(moment), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        moment[rows, begin:].addmm_(x[:, rows].t(), x[:, begin:])


def _mirror(moment: torch.Tensor) -> None:
    """Copy the blocks above the diagonal below it."""
    for begin in range(0, len(moment), _BLOCK):
        rows, end = slice(begin, begin + _BLOCK), begin + _BLOCK
        moment[end:, rows] = moment[rows, end:].t()


def moments_bytes(widths: Iterable[int]) -> int:
    """Return the most bytes for the second moments of layers, in memory or on the disk.

    Args:
        widths: the input features of each layer. Layers may share a tensor, which only a run shows.
    """
    return sum(4 * n * (n + MAX_HELD_OUT) for n in widths if n <= MAX_WIDTH)
