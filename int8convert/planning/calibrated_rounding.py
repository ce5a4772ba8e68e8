"""Decides which weights are rounded by a calibration: those of Linear layers whose inputs' second moments it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import SourceError
from int8convert.planning.fold import Fold, Values
from int8convert.text import counted, quoted

if TYPE_CHECKING:
    from int8convert.calibration.folder import CalibratedInput
    from int8convert.planning.plan import ConversionPlan, PlannedTensor

NEAREST, CALIBRATED = ROUNDINGS = ("nearest", "calibrated")

MIN_HELD_OUT_TOKENS = 64
"""Held-out tokens below which a calibration is refused: too few tell a better rounding of a row from a lucky one."""


@dataclass(frozen=True, slots=True)
class InputMoments:
    """One input of the model, as a calibration measured it.

    Attributes:
        folder: the calibration's.
        sha256: of the calibration's record.
        fold: what a fold of the weight does to the input; None if nothing is folded into the weight.
    """

    folder: Path
    sha256: str
    entry: CalibratedInput
    fold: Fold | None = None

    @property
    def n_features(self) -> int:
        return self.entry.in_features

    @property
    def identity(self) -> tuple[str | float | bool | None, ...]:
        """What tells this input from all others: the hash of its calibration's record, its file there, and its fold."""
        return (self.sha256, self.entry.moments, *(self.fold.identity() if self.fold else ()))

    def load(self) -> tuple[Values, Values]:
        """Return the sum of x x^T over the calibration's tokens, [in, in], and held-out inputs, [tokens, in].

        Raises:
            CorruptFileError: the file is damaged, or holds other shapes.
            SourceError: the gain that is folded into the weight cannot be read.
        """
        from int8convert.calibration.folder import read_moments

        moments = read_moments(self.folder, self.entry)
        assert moments is not None, "planned without moments"
        second_moment, held_out = moments.second_moment.numpy(), moments.held_out.numpy()
        if self.fold is None:
            return second_moment, held_out
        fold = self.fold.load()
        half = np.ascontiguousarray(fold.apply(second_moment, 0).T)
        return fold.apply(half, 0), fold.apply(held_out, 0)


@dataclass(frozen=True, slots=True)
class RoundingCalibration:
    """A calibration that decides codes.

    Attributes:
        sha256: of its record.
        inputs: Linear layer, as the live model names it -> its input. Without layers whose moments were not measured.
    """

    sha256: str
    inputs: Mapping[str, InputMoments] = field(repr=False)

    def identity(self) -> dict[str, str]:
        """Return file name -> sha256, by which a rerun recognizes the calibration."""
        from int8convert.calibration.folder import RECORD

        return {RECORD: self.sha256}


def open_rounding(path: str | os.PathLike[str], source: CheckpointSource) -> RoundingCalibration:
    """Open the calibration of a source. Reads no moments.

    Raises:
        SourceError: the folder holds no calibration, that of another source, no second moments, or too few held-out
            tokens.
        CorruptFileError: a file of it is damaged.
    """
    from int8convert.calibration.folder import RECORD, read_calibration

    folder = Path(path)
    calibration = read_calibration(folder, source)
    n_held_out = calibration.n_held_out * calibration.length
    if n_held_out < MIN_HELD_OUT_TOKENS:
        raise SourceError(
            f"{quoted(str(path), 300)} holds {n_held_out:,} held-out tokens, --round calibrated needs at least "
            f"{MIN_HELD_OUT_TOKENS}",
            "calibrate on more text with int8convert calibrate --moments",
        )
    sha256 = file_sha256(folder / RECORD)
    measured = [entry for entry in calibration.inputs if entry.moments is not None]
    if not measured:
        raise SourceError(
            f"{quoted(str(path), 300)} holds no second moments, by which --round calibrated rounds",
            "calibrate again with int8convert calibrate --moments",
        )
    inputs = {name: InputMoments(folder, sha256, entry) for entry in measured for name in entry.modules}
    return RoundingCalibration(sha256, inputs)


def round_by(plan: ConversionPlan, calibration: RoundingCalibration) -> ConversionPlan:
    """Return the plan with the measured input of each int8 weight, and a note on how many have none.

    Raises:
        SourceError: an input has another width than the weight.
    """
    layers: dict[str, str] = {}
    for parameter, (key, _) in plan.model_map.parameters.items():
        layers.setdefault(key, parameter.removesuffix(".weight"))

    def rounded(tensor: PlannedTensor) -> PlannedTensor:
        layer = layers.get(tensor.source.name, tensor.output_name.removesuffix(".weight"))
        found = calibration.inputs.get(layer) if tensor.is_quantized else None
        if found is not None and found.n_features != tensor.shape[1]:
            raise SourceError(
                f"the calibration is of another model: the input of {quoted(layer)} has {found.n_features:,} features "
                f"there, and {tensor.shape[1]:,} in the source",
                "calibrate this source with int8convert calibrate",
            )
        return replace(tensor, rounding=found and replace(found, fold=tensor.fold and tensor.fold.of_inputs()))

    shards = [replace(shard, tensors=tuple(map(rounded, shard.tensors))) for shard in plan.shards]
    planned = replace(plan, shards=tuple(shards))
    n_int8 = sum(tensor.is_quantized for tensor in planned.tensors)
    n_rounded = sum(tensor.rounding is not None for tensor in planned.tensors)
    note = f"the codes of {n_rounded:,} of {counted(n_int8, 'int8 weight')} are chosen by the calibration"
    if n_rounded < n_int8:
        note += ", the others are rounded to nearest: it holds no second moments of their inputs"
    return replace(planned, model_map=replace(plan.model_map, notes=(*plan.model_map.notes, note)))
