"""Chooses how to convert a checkpoint for the best predictions that its format's loader gives.

1. A calibration of the source is gathered, second moments included, by which weights are rounded.
2. What rounding costs the predictions is estimated for the source as it is, and for the source rotated, in the
   arithmetic of the format's loader. The rotation is taken if it costs less, and if the model allows one.
3. The modules whose rounding costs most stay 16-bit, within a budget.

Costs a run of the model layer by layer, a calibration folder beside the output, and two loads of the model into memory,
one after the other. Does not know what calibrated rounding gains, so the expected divergence is too high. Does not try
smoothing or rotated inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from int8convert.calibration.calibrate import calibrate
from int8convert.calibration.folder import RECORD, read_calibration
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.source import CheckpointSource
from int8convert.errors import CorruptFileError, ModelMapError, SourceError
from int8convert.events import EventSink
from int8convert.hub.cached_copy import fetch_checkpoint
from int8convert.outliers.keep import keep_budget, measure
from int8convert.planning.calibrated_rounding import CALIBRATED
from int8convert.planning.plan_checkpoint import PlanOptions, open_request
from int8convert.runtime.models import choose_device
from int8convert.runtime.text.texts import Text, open_text
from int8convert.runtime.text.windows import read_text
from int8convert.sources import open_source

KEPT_PERCENT = 2.0
"""Share of the weights that may stay 16-bit unless the user sets another."""

_N_CALIBRATED = 128
"""Windows of the calibration. Rounding needs several times as many tokens as a layer has inputs."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What was chosen.

    Attributes:
        options: for `quantize`.
        calibration: the folder of the calibration.
        kl_plain, kl_rotated: expected KL divergence in nats a token, before modules are kept; None if it was not
            estimated, because an earlier run chose, or because the model allows no rotation.
        refusal: why the model is not rotated; "" if it could be.
    """

    options: PlanOptions
    calibration: Path
    kl_plain: float | None = None
    kl_rotated: float | None = None
    refusal: str = ""


def best_options(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PlanOptions,
    text: Text,
    *,
    percent: float = KEPT_PERCENT,
    device: str = "auto",
    on_event: EventSink,
) -> Quality:
    """Return the options for the best predictions. A rerun for an output that was begun returns those of that run.

    Args:
        src: the source.
        out: the output. The calibration is written beside it, to a folder whose name ends in `-calibration`.
        options: what the user asks for: format, modules, files.
        text: what the model reads.
        percent: the most weights to keep in 16 bits, in percent.
        device: where the model runs: "auto", "cpu" or "cuda[:n]".

    Raises:
        Int8ConvertError: the source or the text cannot be read, or the model does not fit in memory.
    """
    folder = Path(f"{os.fspath(out).rstrip('/')}-calibration")
    trusts_code = options.trust_remote_code
    source = open_source(src, options.revision, Path(options.cache_dir) if options.cache_dir is not None else None)
    if not _is_calibrated(folder, source, text):
        directory = source.directory if source.commit is None else fetch_checkpoint(source, on_event)
        many = replace(text, n_sequences=max(text.n_sequences, _N_CALIBRATED))
        calibrate(
            directory,
            folder,
            many,
            with_moments=True,
            device=device,
            trust_remote_code=trusts_code,
            on_event=on_event,
        )
    keep = keep_budget(percent, text, device=device, trust_remote_code=trusts_code)
    chosen = replace(options, round=CALIBRATED, calibration=folder, keep=keep)
    earlier = _earlier_options(out, folder)
    if earlier is not None:
        return Quality(replace(chosen, rotate=earlier.get("rotate") is True), folder)
    used = choose_device(device)
    plain = best = measure(open_request(src, options), text, used, trusts_code, on_event)
    kl_rotated, refusal = None, ""
    try:
        rotated = measure(open_request(src, replace(options, rotate=True)), text, used, trusts_code, on_event)
        kl_rotated = rotated.kl
        best = rotated if rotated.kl < plain.kl else plain
    except (ModelMapError, SourceError) as error:  # the model has no rotation, or a gain that has no fold
        refusal = error.message
    keep = replace(keep, choose=lambda _request, _on_event: best.kept(percent / 100))  # not measured again
    chosen = replace(chosen, rotate=best is not plain, keep=keep)
    return Quality(chosen, folder, plain.kl, kl_rotated, refusal)


def _is_calibrated(folder: Path, source: CheckpointSource, text: Text) -> bool:
    """Return whether a folder holds the calibration of this source on this text."""
    try:
        found = read_calibration(folder, source)
    except (SourceError, CorruptFileError):
        return False
    with open_text(text) as file:
        _, digest = read_text(file.path)
    return found.text_sha256 == digest


def _earlier_options(out: str | os.PathLike[str], folder: Path) -> Mapping[str, Any] | None:
    """Return the options that an output records; None if they were not chosen here, by this calibration."""
    options = (Manifest(Path(out)).read_request() or {}).get("options")
    if not isinstance(options, dict) or "keep_budget" not in options:
        return None
    return options if options.get("calibration") == {RECORD: file_sha256(folder / RECORD)} else None
