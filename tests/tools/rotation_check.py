"""Whether the rotation that is found for a family of models leaves what such a model computes as it is.

The proof in the product runs on the class's small model with its own random weights. This check folds what was proved
into another model, with other weights and other tokens, and compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from int8convert.planning.rotation.groups import run
from int8convert.planning.rotation.parameter_folds import ParameterFold
from int8convert.planning.rotation.worker import find_rotation, fold_into
from tests.tools.family_models import Family, build_family

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


def rotated(model: Any, folds: dict[str, ParameterFold], unties: bool) -> Any:
    """Return a copy of a model with a rotation folded into its weights."""
    config = type(model.config).from_dict(model.config.to_dict())
    if unties:
        config.tie_word_embeddings = False
    copy = type(model)(config).eval()
    weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    fold_into(copy, folds, weights)
    return copy


def _difference(model: Any, folds: dict[str, ParameterFold], unties: bool) -> float:
    ids = torch.arange(3, 40)[None]
    expected, found = run(model, ids), run(rotated(model, folds, unties), ids)
    return float((found - expected).abs().max() / expected.abs().max())
