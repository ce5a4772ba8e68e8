"""Give a small model the outliers that only large models have, without changing what it computes.

There are two injections, so that no way to quantize can win by undoing one of them: in what the norms of an OPT return,
and in the product of a gated MLP, which no norm feeds and where most outliers of trained models are.

Why the function is preserved: what a LayerNorm in a layer of OPT returns, x[j] = g[j] n[j] + b[j] for the normalized
input n, is read by the Linears right after it and by nothing else, as the residual goes past. Such a Linear computes
y = W x + c, hence:
1. scale: x[j] becomes m x[j] and W[:, j] becomes W[:, j] / m; the product of the two, and so y, is what it was.
2. shift: x[j] becomes x[j] + s, which adds s W[:, j] to y; c is lowered by just that.
A gated MLP computes y = D (a(G x) * U x), and nothing else reads the product. Row j of U is multiplied by m, and column
j of D is divided by m, so y is what it was.

What changes is the range of what a Linear reads, and with it what int8 makes of that.

Left out on purpose: norms of other architectures, where something else may read the norm, or where it has no bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import OPTForCausalLM

# What the checkpoint will be stored as.
SOURCE_DTYPE = torch.float16

OutlierKind = Literal["scale", "shift"]


@dataclass(frozen=True)
class Outliers:
    """An injection of outlier features, see `inject_outliers`."""

    kind: OutlierKind
    magnitude: float
    channels: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.magnitude:g}x{self.channels}"


@torch.no_grad()
def inject_outliers(
    model: OPTForCausalLM, kind: OutlierKind, magnitude: float, channels: int, *, seed: int = 0
) -> list[int]:
    """Give `model` outlier features in place, without changing its function, and return which they are, sorted.

    For each LayerNorm with weight g and bias b, each Linear (W, c) that reads it, and each chosen feature j:
        scale:  g[j], b[j] = m g[j], m b[j]      W[:, j] = W[:, j] / m
        shift:  b[j] = b[j] + m (or - m)         c = c - (what was added) W[:, j]
    The features are the same in every layer, as they are in large models.

    It does not know what float16 makes of the scaled columns: at m = 200 the typical weight of 0.05 becomes 0.00025,
    still a normal number there.

    Args:
        magnitude: m; for shift half of the features go down by it, by chance.
        channels: how many features.
        seed: of the choice of features and signs.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randperm(model.config.hidden_size, generator=generator)[:channels]
    signs = torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1.0
    for norm, consumers in _pair_norms_with_consumers(model):
        if kind == "scale":
            _scale_features(norm, consumers, features, magnitude)
        else:
            _shift_features(norm, consumers, features, signs * magnitude)
    return sorted(features.tolist())


@torch.no_grad()
def inject_product_outliers(model: Any, magnitude: float, channels: int, *, seed: int = 0) -> list[int]:
    """Give the inputs of each `down_proj` outlier channels in place, without changing the model's function.

    The channels are the same in every layer. Unlike those of a norm they are large at some tokens and small at others,
    because the product is.

    Args:
        model: with gated MLPs of `up_proj` and `down_proj`: Llama, Qwen, Mistral, Gemma.
        magnitude: factor of the channels' rows in `up_proj`.
        channels: number of channels.
        seed: of the choice of channels.

    Returns:
        the channels, sorted.
    """
    pairs = [(m.up_proj, m.down_proj) for m in model.modules() if hasattr(m, "up_proj") and hasattr(m, "down_proj")]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(pairs[0][1].in_features, generator=generator)[:channels]
    for up, down in pairs:
        up.weight[chosen] *= magnitude
        if up.bias is not None:
            up.bias[chosen] *= magnitude
        down.weight[:, chosen] /= magnitude
    return sorted(chosen.tolist())


def _pair_norms_with_consumers(model: OPTForCausalLM) -> Iterator[tuple[nn.LayerNorm, list[nn.Linear]]]:
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        yield layer.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.final_layer_norm, [layer.fc1]


def _scale_features(norm: nn.LayerNorm, consumers: list[nn.Linear], features: torch.Tensor, factor: float) -> None:
    norm.weight[features] *= factor
    norm.bias[features] *= factor
    for linear in consumers:
        linear.weight[:, features] /= factor


def _shift_features(
    norm: nn.LayerNorm, consumers: list[nn.Linear], features: torch.Tensor, shifts: torch.Tensor
) -> None:
    # Near 60 float16 has steps of 1/32. What is undone must be what the checkpoint will store, not what was asked for.
    before = norm.bias[features].to(SOURCE_DTYPE).float()
    norm.bias[features] = (before + shifts).to(SOURCE_DTYPE).float()
    added = norm.bias[features] - before
    for linear in consumers:
        linear.bias.sub_(linear.weight[:, features].to(SOURCE_DTYPE).float() @ added)
