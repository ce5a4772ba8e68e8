"""The int8 methods of the paper's Table 1, simulated: what each would make of a model in floating point.

A method maps both operands of x @ W.T, x [tokens, in] and W [out, in], to whole numbers, multiplies these exactly and
maps the product back. It is made of three choices.

Which numbers share a scale (Sec. 2.1, 3.1):

    per tensor     one scale for all of x, one for all of W
    row-wise       one for each token of x, one for all of W
    vector-wise    one for each token of x, one for each output feature of W: for each inner product its own two

How numbers become codes, over the numbers v that share a scale (Sec. 2.1, Eq. 1 to 6):

    absmax         scale = 127 / max |v|                 code = rint(scale * v), from -127 to 127
    zeropoint      scale = 254 / (max v - min v)         code = rint(scale * v)
                   int8 holds code - zeropoint, with zeropoint = rint(scale * min v) + 127, so again -127 to 127; the
                   multiplication adds the zeropoint to both operands, so that it multiplies the codes

Whether outlier columns are decomposed (Sec. 3.2, Eq. 8):

    O = { k : |x[t, k]| >= threshold for some t }
    y = x[:, O] @ W[:, O].T  +  (x with O set to 0, quantized) @ (W quantized).T

W is quantized as a whole and once, as a stored int8 weight is. In the decomposed part W is either what its codes stand
for, as in bitsandbytes, or what it was, as the paper has it and as stored columns do.

What is left open there, and chosen here: numbers that are all equal have max v - min v = 0, and then a scale of 1; the
authors' code has 255 steps where the paper has 254; ties go to even. Scales and outlier columns depend on which tokens
go through a layer together: here those of one window. Computed in float64, in which all products of codes are exact.

Costs two float64 copies of one layer's weight, made whenever it runs, and the time of a product in float64. Left out
on purpose: speed, which `runtime` is for.
Source: LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD
from int8convert.runtime.in_memory import modules_to_replace
from int8convert.runtime.pretrained import model_errors


class OutlierWeights(StrEnum):
    """What the outlier columns of x are multiplied by; NONE is no decomposition."""

    NONE = "none"
    INT8 = "int8"
    STORED = "stored"


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        name: as the table prints it.
        is_zeropoint: else absmax.
        x_by_token: one scale for each token; else one for all.
        weight_by_row: one scale for each output feature; else one for all.
        outlier_weights: of the decomposed part.
    """

    name: str
    is_zeropoint: bool
    x_by_token: bool
    weight_by_row: bool
    outlier_weights: OutlierWeights = OutlierWeights.NONE


METHODS = (
    Method("absmax", False, False, False),
    Method("zeropoint", True, False, False),
    Method("absmax row-wise", False, True, False),
    Method("absmax vector-wise", False, True, True),
    Method("zeropoint vector-wise", True, True, True),
    Method("absmax row-wise + decomposition", False, True, False, OutlierWeights.STORED),
    Method("LLM.int8(), int8 outlier weights", False, True, True, OutlierWeights.INT8),
    Method("LLM.int8(), stored 16-bit columns", False, True, True, OutlierWeights.STORED),
    Method("zeropoint LLM.int8()", True, True, True, OutlierWeights.STORED),
)
"""In the order of the paper's Table 1; LLM.int8() is its "absmax vector-wise + decomposition"."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Whole numbers and the scales they stand for: value = code / scale.

    values: float64 [rows, cols], whole. scale: float64 [rows, 1] or [1, 1].
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """float64 [rows, cols]."""
        return self.values / self.scale


def quantize_absmax(v: torch.Tensor, by_row: bool) -> Codes:
    """Absmax quantization of v [rows, cols], with a scale for each row or one for all; zeros stay zeros."""
    largest = v.abs().amax(1, keepdim=True) if by_row else v.abs().amax().view(1, 1)
    scale = torch.where(largest > 0, N_STEPS / largest, 1.0)
    return Codes((v * scale).round(), scale)


def quantize_zeropoint(v: torch.Tensor, by_row: bool) -> Codes:
    """Zeropoint quantization of v [rows, cols], with a scale for each row or one for all, zeropoint added back."""
    high, low = (v.amax(1, keepdim=True), v.amin(1, keepdim=True)) if by_row else (v.amax(), v.amin())
    spread = (high - low).view(-1, 1)
    scale = torch.where(spread > 0, 2 * N_STEPS / spread, 1.0)
    return Codes((v * scale).round(), scale)


class SimulatedLinear(nn.Module):
    """A Linear layer, or Conv1D, computed by one of the methods.

    Args:
        layer: in floating point; kept as it is.
        method: how.
        threshold: magnitude from which a column of the input is an outlier, in the units of x.
    """

    def __init__(self, layer: Any, method: Method, threshold: float = OUTLIER_THRESHOLD) -> None:
        super().__init__()
        self.layer = layer
        self.method = method
        self.threshold = threshold
        self._quantize = quantize_zeropoint if method.is_zeropoint else quantize_absmax

    def weight(self) -> torch.Tensor:
        """The layer's own, float64 [out, in]."""
        weight: torch.Tensor = self.layer.weight.detach().double()
        return weight.t() if type(self.layer).__name__ == "Conv1D" else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> y [..., out], in the dtype of x."""
        tokens, weight = x.reshape(-1, x.shape[-1]).double(), self.weight()
        codes = self._quantize(weight, self.method.weight_by_row)
        y = torch.zeros(tokens.shape[0], weight.shape[0], dtype=torch.float64, device=x.device)
        if self.method.outlier_weights is not OutlierWeights.NONE:
            is_outlier = ~(tokens.abs() < self.threshold).all(0)
            full = weight if self.method.outlier_weights is OutlierWeights.STORED else codes.dequantize()
            y += tokens[:, is_outlier] @ full[:, is_outlier].t()
            tokens = tokens.masked_fill(is_outlier, 0)
        x_codes = self._quantize(tokens, self.method.x_by_token)
        y += (x_codes.values @ codes.values.t()) / x_codes.scale / codes.scale.t()
        if self.layer.bias is not None:
            y += self.layer.bias.detach()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


@contextmanager
def simulating(
    model: Any, method: Method, *, module_names: Sequence[str] | None = None, threshold: float = OUTLIER_THRESHOLD
) -> Iterator[None]:
    """Let Linear layers of a model compute by a method as long as this lasts; then the model is as it was.

    Args:
        model: in floating point, in memory.
        method: of all these layers.
        module_names: which; None for those that LLM.int8() quantizes.
        threshold: see `SimulatedLinear`.
    """
    layers = {name: model.get_submodule(name) for name in module_names or _default_modules(model)}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, SimulatedLinear(layer, method, threshold))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _default_modules(model: Any) -> list[str]:
    """Those that become int8; nn.MultiheadAttention, which has no Linear layer for its input, is left as it is."""
    names = modules_to_replace(model)
    return [name for name in names if not isinstance(model.get_submodule(name), nn.MultiheadAttention)]


class Accumulator(Protocol):
    """Whatever sums up how a model's predictions differ from the reference's."""

    def add(self, log_probs: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Count one window.

        Args:
            log_probs, reference: float32 [positions, vocabulary], natural logarithms of probabilities.
            targets: int64 [positions], the tokens that came.
        """


A = TypeVar("A", bound=Accumulator)


@torch.no_grad()
def compare_methods(
    model: Any,
    windows: Iterable[torch.Tensor],
    new_accumulator: Callable[[], A],
    *,
    methods: Sequence[Method] = METHODS,
    threshold: float = OUTLIER_THRESHOLD,
) -> dict[str, A]:
    """Run windows through the model and through each method's simulation of it, against the model itself.

    Args:
        model: in floating point, in memory; predicts the next token. It stays as it is.
        windows: int64 [length] token ids each; every token but the first is predicted.
        new_accumulator: makes one for each row.
        methods: the rows.
        threshold: magnitude from which a column of an input is an outlier.

    Returns:
        "reference", and the name of each method -> its accumulator; in the order of the table.
    """
    names = _default_modules(model)
    rows = {name: new_accumulator() for name in ("reference", *(method.name for method in methods))}
    for ids in windows:
        targets = ids[1:].to(model.device)
        reference = _log_probs(model, ids)
        rows["reference"].add(reference, reference, targets)
        for method in methods:
            with simulating(model, method, module_names=names, threshold=threshold):
                rows[method.name].add(_log_probs(model, ids), reference, targets)
    return rows


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with model_errors(model):
        log_probs: torch.Tensor = model(ids[None].to(model.device)).logits[0, :-1].float().log_softmax(-1)
    return log_probs
