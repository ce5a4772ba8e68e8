"""Child process that finds the rotations and the smoothed groups of a model, and proves them on a small model.

1. Shrink the model's config, and build its class with random weights, gains and biases: `shrunk_config`, `proof`.
2. Find the groups of weights that a rotation changes together: `groups`.
3. Fold the rotation of the residual stream into a copy of the model, and run both. Equal outputs are the proof. Do the
   same with the rotation of the heads' values, and with random factors of each kind of smoothed group.
4. Expand what is proved to the layers of the real model, which is built without memory. Each of its modules must have
   its place in the small one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch

from int8convert.formats import transforms
from int8convert.planning.folding.groups import (
    Groups,
    expand,
    hidden_size,
    pattern,
    sizes_of,
)
from int8convert.planning.folding.parameter_folds import (
    MIN_BLOCK,
    ParameterFold,
    merge,
    residual_folds,
    rotation_block,
    smooth_groups,
    smoothing_folds,
    value_folds,
)
from int8convert.planning.folding.proof import NoGroupsError, is_proved, small_groups, small_model
from int8convert.planning.model_map.build import build_model
from int8convert.planning.model_map.experts import CheckpointTensor
from int8convert.planning.smoothing import SmoothGroup, SmoothingFactors
from int8convert.transformers_internals import tied_parameters

_BY_OTHERS = "because more than norms and Linear layers work on it"


def find_rotation(model: Any) -> dict[str, Any]:
    """Return the folds that are proved for a model on the meta device, and why others are not.

    Returns:
        {"inputs": groups of layers whose inputs may be rotated while the model runs, "folds": as JSON,
        "untied": the weights of a head and of the embedding that it no longer shares, or null, "refusals": reasons}
    """
    try:
        small, ids, groups = small_groups(model)
    except NoGroupsError as error:
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
        refusals.append(
            f"the residual stream is not rotated: {MIN_BLOCK} does not divide its width {hidden_size(model)}"
        )
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
        return f"because {others[0]}, a {_class_of(small, groups.other_readers[0])}, reads it and is no Linear layer"
    size = hidden_size(small)
    norms = sorted(
        {
            pattern(name)
            for name, module in small.named_modules()
            if "norm" in type(module).__name__.lower() and name not in folded and _width(module) == (size,)
        }
    )
    return f"because {norms[0]} has a gain, and feeds no Linear layer" if norms else _BY_OTHERS


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
    fold = folds.get(f"{name}.weight")
    is_free = fold is None or fold.column_block == 1
    has_bias = model.get_submodule(name).bias is not None
    return is_free and not has_bias and sizes_of(model, name)[0] % transforms.BLOCK_SIZE == 0


def find_smoothing(model: Any, rotated: Collection[str]) -> dict[str, Any]:
    """Return the groups that are proved for a model on the meta device, and why others are not.

    Args:
        rotated: layers whose inputs are rotated. They are not smoothed, too: outliers are spread already.

    Returns:
        {"groups": as JSON, "folds": as JSON, "refusals": reasons}
    """
    try:
        small, ids, groups = small_groups(model)
    except NoGroupsError as error:
        return {"groups": [], "folds": [], "refusals": [str(error)]}
    kinds: dict[str, list[SmoothGroup]] = {}
    for group in smooth_groups(groups, small):
        kinds.setdefault(pattern(group.name), []).append(group)
    generator = torch.Generator().manual_seed(2)
    proved = set()
    refusals = [
        f"what {kind} reads is not smoothed, because it is a {name} and no Linear layer"
        for kind, name in {pattern(other): _class_of(small, other) for other in groups.other_readers}.items()
    ]
    expanded = set(smooth_groups(expand(groups, small), small))
    for kind, found in kinds.items():
        if {group for group in expanded if pattern(group.name) == kind} != set(found):
            refusals.append(f"{kind} is not smoothed: what reads it differs from layer to layer, or in numbers alone")
            continue
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
