"""Estimates what the rounding of each layer costs a model's predictions, by one backward pass.

Rounding moves the output y[t, n] of a layer by a small random error d[t, n]. To second order, the predictions then
diverge by

    KL = 1/2 * mean over t of sum_n g[t, n]^2 * d[t, n]^2

g is the gradient of the log-likelihood of tokens drawn from the model's own predictions: with those, the mean of g g^T
is the Fisher information, which is the second derivative of KL. Errors of different weights are taken as independent. A
rounding error is spread evenly over one step, and its variance is step^2 / 12. Hence, for a layer y = x W^T,

    weights:  d[t, n]^2 = sum_k x[t, k]^2 * w_step[n]^2 / 12          w_step = weight_absmax / 127
    inputs:   d[t, n]^2 = sum_k x_step[t, k]^2 / 12 * W[n, k]^2       x_step = x_absmax / 127, by the arithmetic

The rounding of the weights to a float dtype is taken as the former, with the mean of its squared steps over a row.

The damage is so measured at the model's end. A layer's own relative error ranks layers wrongly, because layers differ
in what they add to the predictions.

On a trained Qwen2 of 0.5B the estimate was 1.7 times what was measured for the weights, 1.0 times for inputs with one
scale a token, and 1.4 times for inputs by blocks of 128 (8 windows, other ones than those measured). For the rounding
of its weights to bfloat16 it was 0.7 times (the same 3 windows).

Does not know errors that are not small or not random, nor choices that are no smooth function of their inputs, such as
those of a router or an indexer. Sees layers that are modules and run on this text: no fused experts, and no weight that
a model's code reads itself.
Source of the expansion: second-order pruning, as in Optimal Brain Surgeon (Hassibi and Stork, 1993), with the Fisher
information in place of the Hessian.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import N_STEPS, OUTLIER_THRESHOLD
from int8convert.calibration.run import run_tokens
from int8convert.calibration.statistics import blocks_of
from int8convert.checkpoint.library_errors import library_errors
from int8convert.errors import SourceError
from int8convert.formats.layers import is_conv1d_layer

INPUTS = ("inputs_by_token", "inputs_by_rule", "inputs_by_blocks")
"""The fields of `LayerDamage` for the arithmetics of the inputs."""


@dataclass(frozen=True, slots=True)
class LayerDamage:
    """The divergence that rounding one layer causes, in nats a token.

    Attributes:
        module_name: the layer.
        n_weights: number of its weights.
        group: a number that layers share which read the same tensor, such as q, k and v. vLLM fuses those, and needs
            all of them in 16 bits, or none.
        weights: by rounding its weights, one scale a row.
        inputs_by_token: by rounding its input, one scale a token.
        inputs_by_rule: the same without outlier columns, by LLM.int8()'s rule.
        inputs_by_blocks: by rounding its input, a scale for each token and block of 128 columns.
        source_rounding: by rounding its weights to the dtype given to `estimate_damage`; 0 if none was.
        columns: float64 [in], on the CPU, the part of each input column in `weights` and `inputs_by_rule`.
    """

    module_name: str
    n_weights: int
    group: int
    weights: float
    inputs_by_token: float
    inputs_by_rule: float
    inputs_by_blocks: float
    source_rounding: float = 0.0
    columns: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def of_inputs(self, inputs: str | None) -> float:
        """Return the damage by the input under an arithmetic, one of `INPUTS`, or None if the input is not rounded."""
        found: float = getattr(self, inputs) if inputs is not None else 0.0
        return found

    def cost(self, inputs: str | None) -> float:
        """Return the damage by weights and input, for an arithmetic as in `of_inputs`."""
        return self.weights + self.of_inputs(inputs)


@dataclass(slots=True)
class _Sums:
    """Constants and sums of one layer, all on its device."""

    n_weights: int
    step_squares: torch.Tensor
    source_step_squares: torch.Tensor
    block_squares: torch.Tensor
    column_weights: torch.Tensor
    output_weights: torch.Tensor
    group: int = -1
    weights: float = 0.0
    inputs_by_token: float = 0.0
    inputs_by_rule: float = 0.0
    inputs_by_blocks: float = 0.0
    source_rounding: float = 0.0

    def add(self, threshold: float, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Add the tokens x [..., in] and the gradients of their outputs [..., out]."""
        x, g2 = x.reshape(-1, x.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float().square()
        x_squares, by_weights = x.square().sum(1), g2 @ self.step_squares
        self.weights += float(by_weights @ x_squares) / 24
        self.column_weights += (by_weights @ x.square()) / 24
        self.source_rounding += float((g2 @ self.source_step_squares) @ x_squares) / 24
        by_block = g2 @ self.block_squares
        magnitude = x.abs()
        found = magnitude.amax(0) >= threshold
        self.inputs_by_token += _cost(magnitude.amax(1, keepdim=True), by_block)
        by_rule = magnitude.masked_fill(found, 0).amax(1, keepdim=True)
        self.inputs_by_rule += _cost(by_rule, by_block)
        self.output_weights += (by_rule / N_STEPS).square()[:, 0] @ g2 / 24
        self.inputs_by_blocks += _cost(blocks_of(magnitude).amax(-1), by_block)


def _cost(absmax: torch.Tensor, by_block: torch.Tensor) -> float:
    """Return what steps of these maxima cost, [tokens, 1 or blocks], by the squares of the weights of each block."""
    return float(((absmax / N_STEPS).square() * by_block).sum()) / 24


def estimate_damage(
    model: Any,
    layers: Mapping[str, nn.Module],
    windows: Iterable[torch.Tensor],
    threshold: float = OUTLIER_THRESHOLD,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    hint: str = "leave out --damage",
) -> tuple[LayerDamage, ...]:
    """Estimate the damage of rounding each layer, in the order of `layers`; layers that never run are left out.

    Memory: that of one window's forward and backward pass, and a float32 number for each output and block of inputs.

    Args:
        model: in floating point, and predicts the next token. Its parameters need no gradient and get none.
        layers: name -> nn.Linear or GPT-2's Conv1D.
        windows: int64 [tokens] each.
        threshold: magnitude from which an input's column is an outlier by LLM.int8()'s rule.
        seed: of the tokens that are drawn from the predictions.
        dtype: bfloat16 or float16: also estimate what rounding the weights to it costs.
        hint: the hint of errors.

    Raises:
        SourceError: the predictions are not finite, or the model has no gradient.
    """
    sums = {name: _constants(layer, dtype) for name, layer in layers.items()}
    generator = torch.Generator(model.device).manual_seed(seed)
    n_tokens, group_numbers = 0, itertools.count()
    for ids in windows:
        with (
            library_errors(f"the damage of rounding {type(model).__name__} cannot be measured", hint),
            _frozen(model),
            torch.enable_grad(),
            _watching(layers, sums, threshold, group_numbers),
        ):
            logits = run_tokens(model, ids[None]).logits[0].float()
            if not bool(logits.isfinite().all()):
                raise SourceError(f"{type(model).__name__} predicts values that are not finite on this text", hint)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        n_tokens += len(ids)
    n = max(1, n_tokens)
    return tuple(
        LayerDamage(
            name,
            found.n_weights,
            found.group,
            weights=found.weights / n,
            inputs_by_token=found.inputs_by_token / n,
            inputs_by_rule=found.inputs_by_rule / n,
            inputs_by_blocks=found.inputs_by_blocks / n,
            source_rounding=found.source_rounding / n,
            columns=_columns(layers[name], found) / n,
        )
        for name, found in sums.items()
        if found.group >= 0
    )


def backward_bytes(config: Any, length: int) -> int:
    """Return about how much memory the forward and backward pass of a window takes beside the model, from its config.

    Counts 40 float32 values for each layer and hidden feature of a token, and 4 for each entry of the vocabulary.
    """
    text = config.get_text_config()
    values = 40 * int(text.num_hidden_layers) * int(text.hidden_size) + 4 * int(text.vocab_size)
    return 4 * length * values


def _constants(layer: Any, dtype: torch.dtype | None) -> _Sums:
    weight = layer.weight.detach().t() if is_conv1d_layer(layer) else layer.weight.detach()
    step_squares = (weight.abs().amax(1).float() / N_STEPS).square()
    block_squares = torch.cat([blocks_of(rows.float()).square().sum(-1) for rows in weight.split(256)])
    source_step_squares = torch.zeros_like(step_squares)
    if dtype is not None:
        source_step_squares = torch.cat([_mean_step_square(rows.float(), dtype) for rows in weight.split(256)])
    sums = torch.zeros(weight.shape[1], device=weight.device), torch.zeros(weight.shape[0], device=weight.device)
    return _Sums(weight.numel(), step_squares, source_step_squares, block_squares, *sums)


def _columns(layer: Any, sums: _Sums) -> torch.Tensor:
    """Return the cost of each column, summed over tokens: of its weights, and of its share of the input by the rule."""
    weight = layer.weight.detach().t() if is_conv1d_layer(layer) else layer.weight.detach()
    total = sums.column_weights
    for rows, part in zip(weight.split(256), sums.output_weights.split(256), strict=True):
        total = total + part @ rows.float().square()
    return total.double().cpu()


def _mean_step_square(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean of step^2 over each row, where step is the distance of a weight from the next number of a dtype.

    Large inputs may belong to weights that are smaller than the others of their row, so the mean is an upper estimate.
    """
    exponents = rows.frexp().exponent - 1
    steps = torch.ldexp(torch.full_like(rows, torch.finfo(dtype).eps), exponents)
    return steps.masked_fill(rows == 0, 0).square().mean(1)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Take gradients of hidden states alone, from the embeddings on, until the context ends."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    # Times one, for some models change the embeddings in place, which a leaf of the graph forbids.
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, y: y.requires_grad_() * 1)
    try:
        yield
    finally:
        hook.remove()
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], sums: Mapping[str, _Sums], threshold: float, group_numbers: Iterator[int]
) -> Iterator[None]:
    """Add each layer's input and the gradient of its output to its sums, for one pass."""
    groups: dict[int, tuple[int, torch.Tensor]] = {}  # the tensors stay alive, so that no id is used twice

    def after(found: _Sums, _module: Any, inputs: tuple[Any, ...], named: dict[str, Any], y: torch.Tensor) -> None:
        x = (*inputs, *named.values())[0]
        if not x.numel():  # an expert may get no token
            return
        if id(x) not in groups:
            groups[id(x)] = (next(group_numbers), x)
        found.group = groups[id(x)][0] if found.group < 0 else found.group
        if y.requires_grad:
            y.register_hook(partial(found.add, threshold, x.detach()))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(partial(after, sums[name]), with_kwargs=True)
            hooks.callback(hook.remove)
        yield
