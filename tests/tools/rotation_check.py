"""Whether the rotation and the smoothing found for a family of models leave what such a model computes as it is.

The proof in the product runs on the class's small model with its own random weights. This check folds what was proved
into another model, with other weights and other tokens, and compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from int8convert.planning.folding.groups import run
from int8convert.planning.folding.parameter_folds import ParameterFold
from int8convert.planning.folding.proof import fold_into
from int8convert.planning.folding.worker import find_rotation, find_smoothing
from int8convert.planning.smoothing import SmoothingFactors
from tests.tools.family_models import Family, build_family

_NO_FACTORS = SmoothingFactors({})

TOLERANCE = 1e-4
"""Allowed difference, as a share of the largest output."""


@dataclass(frozen=True, slots=True)
class RotationResult:
    """The outcome for one family.

    Attributes:
        n_folds: parameters that a fold changes; 0 if the rotation is refused.
        rotates_stream: whether the residual stream is rotated, and not the heads' values alone.
        difference: largest difference of an output, as a share of the largest one.
        refusals: what is not rotated, and why.
    """

    family: str
    n_folds: int
    rotates_stream: bool
    difference: float
    refusals: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether the model computes the same, and whatever is refused has a reason."""
        return self.difference <= TOLERANCE and (self.rotates_stream or bool(self.refusals))


def check_rotation(family: Family) -> RotationResult:
    """Find the rotation of a family, and compare a model with the same model rotated."""
    model = randomized(build_family(family))
    with torch.device("meta"):
        real = type(model)(model.config)
    found = find_rotation(real)
    folds = {fields["parameter"]: ParameterFold(**fields) for fields in found["folds"]}
    rotates_stream = any(fold.gain for fold in folds.values())
    difference = _difference(model, folds, found["untied"] is not None) if folds else 0.0
    return RotationResult(family.name, len(folds), rotates_stream, difference, tuple(found["refusals"]))


def randomized(model: Any) -> Any:
    """Give a model weights, gains and biases of which every one counts."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.2, generator=generator)
        elif parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def rotated(
    model: Any, folds: dict[str, ParameterFold], unties: bool, smoothing: SmoothingFactors = _NO_FACTORS
) -> Any:
    """Return a copy of a model with a rotation, or factors, folded into its weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    if unties:
        config.tie_word_embeddings = False
    copy = type(model)(config).eval()
    weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    fold_into(copy, folds, weights, smoothing)
    return copy


def _difference(
    model: Any, folds: dict[str, ParameterFold], unties: bool, smoothing: SmoothingFactors = _NO_FACTORS
) -> float:
    ids = torch.arange(3, 40)[None]
    expected, found = run(model, ids), run(rotated(model, folds, unties, smoothing), ids)
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True, slots=True)
class SmoothingResult:
    """The outcome for one family.

    Attributes:
        n_groups: groups that are smoothed; 0 if all are refused.
        difference: largest difference of an output, as a share of the largest one.
        refusals: what is not smoothed, and why.
    """

    family: str
    n_groups: int
    difference: float
    refusals: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        """Whether the model computes the same, and whatever is refused has a reason."""
        return self.difference <= TOLERANCE and bool(self.n_groups or self.refusals)


def check_smoothing(family: Family) -> SmoothingResult:
    """Find the groups of a family, and compare a model with the same model smoothed by random factors."""
    model = randomized(build_family(family))
    with torch.device("meta"):
        real = type(model)(model.config)
    found = find_smoothing(real, ())
    folds = {fields["parameter"]: ParameterFold(**fields) for fields in found["folds"]}
    generator = np.random.default_rng(1)
    factors = {group["name"]: np.exp(generator.normal(0, 0.7, group["size"])) for group in found["groups"]}
    smoothing = SmoothingFactors({name: values.astype(np.float32) for name, values in factors.items()})
    difference = _difference(model, folds, False, smoothing) if folds else 0.0
    return SmoothingResult(family.name, len(found["groups"]), difference, tuple(found["refusals"]))
