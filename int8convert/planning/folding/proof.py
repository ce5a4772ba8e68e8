"""Proves folds on a small model with random weights, whose outputs must be equal with and without the folds.

Does not know whether the class computes the same at other sizes than those of the small model. No class is known that
does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from int8convert.formats.layers import is_conv1d_layer
from int8convert.planning.fold import Fold, LoadedFold
from int8convert.planning.folding.groups import Groups, find_groups, pattern, run
from int8convert.planning.folding.parameter_folds import ParameterFold
from int8convert.planning.folding.shrunk_config import shrink
from int8convert.planning.smoothing import SmoothingFactors

N_TOKENS = 12
TOLERANCE = 1e-4
"""Allowed difference of an output, as a share of the outputs' spread. Roundings of float32 come to 1e-6."""

_NO_FACTORS = SmoothingFactors({})


def small_model(model: Any, is_tied: bool | None = None) -> Any:
    """Return a small model of a model's class, with random weights in float32; the same for the same arguments.

    Args:
        is_tied: whether its head shares the embedding's weight; None leaves that to the config.
    """
    changes = shrink(model.config)
    config = type(model.config).from_dict(_changed(model.config.to_dict(), changes))
    if is_tied is not None:
        config.tie_word_embeddings = is_tied
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    small = type(model)(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in small.named_parameters():
        _fill(name, parameter.data, generator)
    return small


def _changed(entries: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: _changed(entries[key], value) for key, value in changes.items() if isinstance(value, dict)}
    return {**entries, **changes, **nested}


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a parameter with random values of a size at which every part of the model counts."""
    if values.dim() >= 2:
        values.normal_(0, values.shape[-1] ** -0.5, generator=generator)
    elif name.endswith("bias"):
        values.normal_(0, 0.3, generator=generator)
    elif values.is_floating_point() and values.dim() == 1:
        values.uniform_(0.5, 1.5, generator=generator)


def fold_into(
    model: Any,
    folds: Mapping[str, ParameterFold],
    weights: Mapping[str, torch.Tensor],
    smoothing: SmoothingFactors = _NO_FACTORS,
) -> None:
    """Set the parameters of a small model to folded weights, those of the head included.

    Args:
        weights: those before the fold.
    """
    for name, parameter in model.named_parameters():
        before, fold = weights[name], folds.get(name)
        if fold is None:
            parameter.data.copy_(before)
            continue
        is_transposed = is_conv1d_layer(model.get_submodule(name.rpartition(".")[0])) and before.dim() == 2
        gain = weights[f"{fold.gain}.weight"] + fold.offset if fold.gain else None
        factors = None if gain is None else (1 / gain if fold.divides else gain).numpy()
        values = (before.t() if is_transposed else before).contiguous().numpy()
        done = Fold(
            gain_of_rows=fold.divides,
            row_block=fold.row_block,
            column_block=fold.column_block,
            constant=fold.constant,
            row_factors=smoothing.of_rows(fold.row_factors),
            column_factors=smoothing.of_columns(fold.column_factors, values.shape[-1], fold.head),
            offset=0.0 if fold.gain else fold.offset,
        )
        folded = torch.from_numpy(LoadedFold(done, factors).apply(values, 0))
        parameter.data.copy_(folded.t() if is_transposed else folded)


def is_proved(
    model: Any,
    folds: Mapping[str, ParameterFold],
    ids: torch.Tensor,
    unties: bool,
    smoothing: SmoothingFactors = _NO_FACTORS,
) -> bool:
    """Return whether a folded small model computes what the small model does."""
    small = small_model(model)
    weights = {name: parameter.detach().clone() for name, parameter in small.named_parameters(remove_duplicate=False)}
    folded = small_model(model, is_tied=False if unties else None)
    fold_into(folded, folds, weights, smoothing)
    expected, found = run(small, ids), run(folded, ids)
    difference, spread = float((found - expected).abs().max()), float(expected.std())
    return spread > 0 and difference <= TOLERANCE * spread


def _without_place(small: Any, real: Any) -> str | None:
    """Return a module of the real model whose place the small one lacks; None if there is none."""
    known = {pattern(name) for name, module in small.named_modules() if _has_weights(module)}
    return next((n for n, module in real.named_modules() if _has_weights(module) and pattern(n) not in known), None)


def _has_weights(module: Any) -> bool:
    return next(module.parameters(recurse=False), None) is not None


class NoGroupsError(Exception):
    """A model's groups cannot be found, for the reason in the message."""


def small_groups(model: Any) -> tuple[Any, torch.Tensor, Groups]:
    """Return a small model of a model's class, token ids for it, and its groups."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise NoGroupsError(f"{name} has an encoder and a decoder, which is not supported")
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise NoGroupsError(f"{name} has layers that share keys and values, which is not supported")
    try:
        small = small_model(model)
        ids = torch.randint(3, small.get_input_embeddings().num_embeddings, (1, N_TOKENS), generator=_seeded())
        groups = find_groups(small, ids)
    except Exception as error:  # a class may refuse any config, in any way
        first = str(error).strip().partition("\n")[0]
        raise NoGroupsError(f"a small {name} cannot be built and run: {type(error).__name__}: {first}") from error
    lacking = _without_place(small, model)
    if lacking is not None:
        raise NoGroupsError(f"a small {name} has no {lacking}")
    return small, ids, groups


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)
