"""Child process that finds the rotations and the smoothed groups of a model, and proves them on a small model.

1. Shrink the model's config, and build its class with random weights, gains and biases: `shrunk_config`.
2. Find the groups of weights that a rotation changes together: `groups`.
3. Fold the rotation of the residual stream into a copy of the model, and run both. Equal outputs are the proof. Do the
   same with the rotation of the heads' values, and with random factors of each kind of smoothed group.
4. Expand what is proved to the layers of the real model, which is built without memory. Each of its modules must have
   its place in the small one.

Does not know whether the class computes the same at other sizes than those of the small model. No class is known that
does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch

from int8convert.formats import transforms
from int8convert.formats.layers import is_conv1d_layer
from int8convert.planning.fold import Fold, LoadedFold
from int8convert.planning.model_map.build import build_model
from int8convert.planning.model_map.experts import CheckpointTensor
from int8convert.planning.rotation.groups import (
    Groups,
    expand,
    find_groups,
    hidden_size,
    in_features,
    pattern,
    run,
)
from int8convert.planning.rotation.parameter_folds import (
    MIN_BLOCK,
    ParameterFold,
    merge,
    residual_folds,
    rotation_block,
    smooth_groups,
    smoothing_folds,
    value_folds,
)
from int8convert.planning.rotation.shrunk_config import shrink
from int8convert.planning.smoothing import SmoothGroup, SmoothingFactors
from int8convert.transformers_internals import tied_parameters

N_TOKENS = 12
_BY_OTHERS = "for more than norms and Linear layers work on it"
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


class _NoGroupsError(Exception):
    """A model's groups cannot be found, for the reason in the message."""


def _small_groups(model: Any) -> tuple[Any, torch.Tensor, Groups]:
    """Return a small model of a model's class, token ids for it, and its groups."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise _NoGroupsError(f"{name} has an encoder and a decoder, which is not supported")
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise _NoGroupsError(f"{name} has layers that share keys and values, which is not supported")
    try:
        small = small_model(model)
        ids = torch.randint(3, small.get_input_embeddings().num_embeddings, (1, N_TOKENS), generator=_seeded())
        groups = find_groups(small, ids)
    except Exception as error:  # a class may refuse any config, in any way
        first = str(error).strip().partition("\n")[0]
        raise _NoGroupsError(f"a small {name} cannot be built and run: {type(error).__name__}: {first}") from error
    lacking = _without_place(small, model)
    if lacking is not None:
        raise _NoGroupsError(f"a small {name} has no {lacking}")
    return small, ids, groups


def find_rotation(model: Any) -> dict[str, Any]:
    """Return the folds that are proved for a model on the meta device, and why others are not.

    Returns:
        {"inputs": groups of layers whose inputs may be rotated while the model runs, "folds": as JSON,
        "untied": the weights of a head and of the embedding that it no longer shares, or null, "refusals": reasons}
    """
    try:
        small, ids, groups = _small_groups(model)
    except _NoGroupsError as error:
        return {"inputs": [], "folds": [], "untied": None, "refusals": [str(error)]}
    refusals: list[str] = []
    head = f"{_head(small)}.weight"
    unties = head in tied_parameters(model)
    real = expand(groups, model)
    residual = _residual(model, groups, ids, unties, refusals)
    values = _values(model, groups, ids, refusals)
    pairs = [(first, second) for first, second in real.pairs if pattern(first) in values]
    found = merge(chain(residual_folds(real, model) if residual else (), value_folds(pairs, model)))
    inputs = [*(() if residual else (group.readers for group in real.norms)), *((name,) for name in real.writers)]
    return {
        "inputs": [names for names in inputs if all(_may_rotate_input(model, name, found) for name in names)],
        "folds": [fold.to_json() for fold in found.values()],
        "untied": [head, tied_parameters(model)[head]] if unties and residual else None,
        "refusals": refusals,
    }


def _residual(model: Any, groups: Groups, ids: torch.Tensor, unties: bool, refusals: list[str]) -> bool:
    if not groups.norms or not groups.embeddings:
        refusals.append("the residual stream is not rotated: no norm between it and a Linear layer was found")
        return False
    if rotation_block(hidden_size(model)) < MIN_BLOCK:
        refusals.append(f"the residual stream is not rotated: {MIN_BLOCK} does not divide its {hidden_size(model)}")
        return False
    small = small_model(model)
    if is_proved(model, merge(residual_folds(groups, small)), ids, unties):
        return True
    refusals.append(
        f"the residual stream is not rotated: a rotated small model computes something else, {_suspect(small, groups)}"
    )
    return False


def _suspect(small: Any, groups: Groups) -> str:
    """Return what may be the reason: what works on the residual stream and cannot be folded."""
    folded = {group.norm for group in groups.norms}
    others = sorted(set(map(pattern, groups.other_readers)))
    if others:
        return f"for {others[0]}, a {_class_of(small, groups.other_readers[0])}, reads it and is no Linear layer"
    size = hidden_size(small)
    norms = sorted(
        {
            pattern(name)
            for name, module in small.named_modules()
            if "norm" in type(module).__name__.lower() and name not in folded and _width(module) == (size,)
        }
    )
    return f"for {norms[0]} has a gain, and feeds no Linear layer" if norms else _BY_OTHERS


def _class_of(model: Any, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def _width(module: Any) -> tuple[int, ...]:
    return tuple(getattr(getattr(module, "weight", None), "shape", ()))


def _values(model: Any, groups: Groups, ids: torch.Tensor, refusals: list[str]) -> set[str]:
    """Return the patterns of the layers of values whose rotation is proved."""
    small = small_model(model)
    kinds: dict[str, list[tuple[str, str]]] = {}
    for first, second in groups.pairs:
        kinds.setdefault(pattern(first), []).append((first, second))
    proved = set()
    for kind, pairs in kinds.items():
        folds = merge(value_folds(pairs, small))
        if folds and is_proved(model, folds, ids, unties=False):
            proved.add(kind)
    if not proved:
        refusals.append("the heads' values are not rotated: no layer was found that computes them alone")
    return proved


def _head(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _may_rotate_input(model: Any, name: str, folds: Mapping[str, ParameterFold]) -> bool:
    """Return whether a layer's input is not rotated already, and vLLM would rotate it: the layer has no bias."""
    module, fold = model.get_submodule(name), folds.get(f"{name}.weight")
    is_free = fold is None or fold.column_block == 1
    return is_free and module.bias is None and in_features(module) % transforms.BLOCK_SIZE == 0


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def find_smoothing(model: Any, rotated: Collection[str]) -> dict[str, Any]:
    """Return the groups that are proved for a model on the meta device, and why others are not.

    Args:
        rotated: layers whose inputs are rotated. They are not smoothed, too: outliers are spread already.

    Returns:
        {"groups": as JSON, "folds": as JSON, "refusals": reasons}
    """
    try:
        small, ids, groups = _small_groups(model)
    except _NoGroupsError as error:
        return {"groups": [], "folds": [], "refusals": [str(error)]}
    kinds: dict[str, list[SmoothGroup]] = {}
    for group in smooth_groups(groups, small):
        kinds.setdefault(pattern(group.name), []).append(group)
    generator = torch.Generator().manual_seed(2)
    proved = set()
    refusals = [
        f"what {kind} reads is not smoothed, for it is a {name} and no Linear layer"
        for kind, name in {pattern(other): _class_of(small, other) for other in groups.other_readers}.items()
    ]
    for kind, found in kinds.items():
        factors = {g.name: torch.empty(g.size).uniform_(0.5, 2, generator=generator).numpy() for g in found}
        folds = merge(smoothing_folds(found, groups, small))
        if is_proved(model, folds, ids, unties=False, smoothing=SmoothingFactors(factors)):
            proved.add(kind)
        else:
            refusals.append(f"{kind} is not smoothed: a smoothed small model computes something else")
    real = expand(groups, model)
    smooth = [
        group
        for group in smooth_groups(real, model)
        if pattern(group.name) in proved and not set(group.readers) & set(rotated)
    ]
    return {
        "groups": [asdict(group) for group in smooth],
        "folds": [fold.to_json() for fold in merge(smoothing_folds(smooth, real, model)).values()],
        "refusals": refusals or ([] if kinds else ["no norm or layer that feeds Linear layers alone was found"]),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the folds that `rotation.find_folds` asks for."""
    tensors = [CheckpointTensor(name, dtype, tuple(shape), place) for name, dtype, shape, place in request["tensors"]]
    model, _, _ = build_model(request["directory"], tensors, request["trusts_code"], request["dtype"])
    nothing: dict[str, Any] = {"inputs": [], "folds": [], "untied": None, "groups": [], "refusals": []}
    rotation = find_rotation(model) if request["rotates"] else nothing
    if not request["rotates_inputs"]:
        rotation = {**rotation, "inputs": []}
    folds = [ParameterFold(**fields) for fields in rotation["folds"]]
    rotated = {fold.parameter.removesuffix(".weight") for fold in folds if fold.column_block > 1}
    rotated.update(name for names in rotation["inputs"] for name in names)
    smoothing = find_smoothing(model, rotated) if request["smooths"] else nothing
    folds += [ParameterFold(**fields) for fields in smoothing["folds"]]
    merged_folds = [fold.to_json() for fold in merge(folds).values()]
    return {"rotation": rotation, "smoothing": smoothing, "folds": merged_folds}
