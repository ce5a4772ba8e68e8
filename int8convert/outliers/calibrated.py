"""Chooses the columns that an int8 checkpoint stores by the calibration of its source; no model is run."""

from __future__ import annotations

import os
from typing import Any

from int8convert.calibration.folder import Calibration
from int8convert.formats.int8_checkpoint import open_int8_checkpoint
from int8convert.formats.modules import module_of
from int8convert.outliers.choice import BUDGET, MIN_SHARE, choose_columns
from int8convert.planning.plan_checkpoint import PlanOptions, plan
from int8convert.sources import open_source


def calibrated_columns(
    calibration: Calibration,
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, tuple[int, ...]]:
    """Choose columns by the rule of `outliers.choice`: module name as in `out` -> its columns, ascending.

    Modules without any are left out, as are those that the calibration has not seen.

    Args:
        src: the source of `out`, which was calibrated.
        revision: the converted revision of a source on the Hub.
    """
    checkpoint = open_int8_checkpoint(open_source(out))
    planned_as = module_of(checkpoint.format).PLANNED_AS
    planned = plan(src, PlanOptions(format=planned_as, trust_remote_code=trust_remote_code, revision=revision))
    outputs = {tensor.source.name: tensor.output_name.removesuffix(".weight") for tensor in planned.tensors}
    int8 = {weight.module_name for weight in checkpoint.weights}
    stored = {
        parameter.removesuffix(".weight"): outputs[source_name]
        for parameter, (source_name, _) in planned.model_map.parameters.items()
        if outputs.get(source_name) in int8
    }
    names = {name: stored[name] for name in calibration.statistics if name in stored}
    columns = choose_columns(
        {names[name]: calibration.weights[name] for name in names},
        {names[name]: calibration.statistics[name] for name in names},
    )
    return {name: tuple(found.tolist()) for name, found in columns.items() if found.numel()}


def describe(calibration: Calibration) -> dict[str, Any]:
    """Return how the columns were chosen, for the file that holds them."""
    names = ("text", "text_sha256", "n_sequences", "length", "threshold")
    return {**{name: getattr(calibration, name) for name in names}, "min_share": MIN_SHARE, "budget": BUDGET}
