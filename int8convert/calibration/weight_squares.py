"""The sums of a layer's weights by which the error of each input column is judged, see `outliers.choice`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cuda_kernels.reference import N_STEPS
from int8convert.formats.layers import is_conv1d_layer
from int8convert.runtime.linear import Int8Linear

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class WeightSquares:
    """Sums over the weight [out, in] of one layer; NaN where the weight could not be read.

    Attributes:
        n_rows: output features.
        columns: float64 [in], on the CPU, the sum of w^2 over each column.
        steps: the sum of w_step^2 over all rows, w_step = weight_absmax / 127.
    """

    n_rows: int
    columns: torch.Tensor
    steps: float


def weight_squares(layer: Any) -> WeightSquares:
    """Sum the weight of a Linear layer, int8 or not, or of a Conv1D; one that is offloaded to the disk gives NaN."""
    is_int8 = isinstance(layer, Int8Linear)
    weight = layer.weight.detach().t() if is_conv1d_layer(layer) else layer.weight.detach()
    if weight.is_meta:
        return WeightSquares(weight.shape[0], torch.full((weight.shape[1],), torch.nan, dtype=torch.float64), torch.nan)
    columns = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    steps = 0.0
    for begin in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = slice(begin, begin + _ROWS_AT_A_TIME)
        values = weight[rows].float()
        absmax = layer.weight_absmax[rows] if is_int8 else values.abs().amax(1)
        if is_int8:
            values = values * (absmax / N_STEPS)[:, None]
        columns += values.square().sum(0)
        steps += float((absmax / N_STEPS).square().sum(dtype=torch.float64))
    return WeightSquares(weight.shape[0], columns.cpu(), steps)
