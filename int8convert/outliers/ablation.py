"""Ablation: sets outlier features of the hidden state to zero, and measures what that does to the predictions.

The dimensions are zeroed in the inputs of the Linear layers that read the hidden state. Three runs use the same tokens:
as it is; without the dimensions asked for; without as many others, drawn at random. In large models the first few carry
the predictions and the others hardly count: in Sec. 4.1 of LLM.int8() (arXiv:2208.07339) the top-1 probability falls by
more than 20 % and the perplexity rises by 600 % and more, against 0.1 % for random ones.

Does not know the effect of a single dimension: they are only taken away together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8convert.calibration.run import run_tokens
from int8convert.formats.layers import features_of
from int8convert.runtime.pretrained import model_errors


@dataclass(frozen=True, slots=True)
class AblationRun:
    """One run.

    Attributes:
        name: "none", "outliers" or "random".
        columns: the dimensions that were zero.
        top1_probability: mean over positions of the probability of the likeliest token, 0 to 1.
        perplexity: exp of the mean negative log-likelihood of all tokens but the first of each window; infinite if
            that overflows.
    """

    name: str
    columns: tuple[int, ...]
    top1_probability: float
    perplexity: float


def ablate(
    model: Any, layers: Mapping[str, nn.Module], ids: torch.Tensor, columns: Sequence[int], *, seed: int = 0
) -> tuple[AblationRun, ...]:
    """Run the model as it is, without `columns`, and without as many random others.

    Args:
        layers: the layers whose inputs are the hidden state; all of one width.
        ids: int64 [n, length], length at least 2.
        columns: dimensions of the hidden state, fewer than half of them.
        seed: of the random ones.
    """
    width, _ = features_of(next(iter(layers.values()))) or (0, 0)
    generator = torch.Generator().manual_seed(seed)
    others = [k for k in torch.randperm(width, generator=generator).tolist() if k not in set(columns)]
    drawn = {"none": (), "outliers": tuple(columns), "random": tuple(sorted(others[: len(columns)]))}
    runs = []
    for name, zeroed in drawn.items():
        with zeroing(layers, zeroed):
            runs.append(AblationRun(name, zeroed, *_predict(model, ids)))
    return tuple(runs)


@contextmanager
def zeroing(layers: Mapping[str, nn.Module], columns: Sequence[int]) -> Iterator[None]:
    """Set columns of these layers' inputs to zero until the context ends."""

    def before(
        _module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        first, *rest = (*inputs, *named.values())
        x = first.index_fill(-1, torch.tensor(columns, dtype=torch.long, device=first.device), 0)
        return (x, *rest), {}

    with ExitStack() as hooks:
        for module in layers.values() if columns else ():
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@torch.no_grad()
def _predict(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Return mean top-1 probability and perplexity."""
    top1 = nll = 0.0
    for window in ids:
        with model_errors(model):
            log_probs = run_tokens(model, window[None]).logits[0, :-1].float().log_softmax(-1)
        targets = window[1:, None].to(log_probs.device)
        top1 += float(log_probs.amax(-1).exp().sum(dtype=torch.float64))
        nll -= float(log_probs.gather(-1, targets).sum(dtype=torch.float64))
    n = ids[:, 1:].numel()
    mean = nll / n
    return top1 / n, math.exp(mean) if mean < 700 else math.inf
