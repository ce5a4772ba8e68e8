"""Runs a text through a checkpoint, and writes statistics of what its Linear layers read to a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cuda_kernels.reference import OUTLIER_THRESHOLD
from int8convert.calibration.folder import Calibration, begin_folder, write_calibration
from int8convert.calibration.moments import MAX_HELD_OUT, moments_bytes
from int8convert.calibration.run import Readings, RunOptions, Task, read_inputs
from int8convert.calibration.windows import fit_windows, local_directory, read_windows_for
from int8convert.checkpoint.atomic import as_output_error
from int8convert.checkpoint.hashing import json_sha256
from int8convert.errors import stating
from int8convert.events import EventSink
from int8convert.formats.layers import features_of
from int8convert.progress_bar import sink_or_bar
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.models import choose_device
from int8convert.runtime.text.texts import Text
from int8convert.sources import open_source

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def calibrate(
    src: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    text: Text = Text(n_sequences=128),  # noqa: B008, frozen
    *,
    with_moments: bool = False,
    threshold: float = OUTLIER_THRESHOLD,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_event: EventSink | None = None,
) -> Calibration:
    """Run a text through a checkpoint layer by layer, and write statistics of what its layers read to a folder.

    Sees all Linear layers and GPT-2's Conv1D but the output head. Does not see experts that are fused in one tensor.
    Does not know what other texts would show. Memory: one decoder layer, and with second moments those of its inputs.

    Args:
        src: a directory, or a repository on the Hub.
        folder: the folder to write, see `calibration.folder`; an earlier calibration in it is replaced.
        text: what the model reads; windows have 256 tokens by default, or what the model takes if that is less.
        with_moments: also gather second moments, 4 * in^2 bytes for each input, and hold out the last quarter of the
            windows from them, at most 1,024 tokens.
        threshold: magnitude from which a value is an outlier.
        device: "auto", "cpu" or "cuda[:n]".
        trust_remote_code: run code in the checkpoint.
        on_event: receives `MeasurementStarted` and `MeasurementStep`; None for a bar.

    Returns:
        the calibration as the folder holds it.

    Raises:
        Int8ConvertError: checkpoint or text cannot be read, the model cannot be run, or the folder cannot be written.
        ValueError: the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError("threshold must be positive")
    folder, used = Path(folder), choose_device(device)
    with stating(f"'{folder}' holds no new calibration"), sink_or_bar(on_event, "calibrate") as sink:
        directory = local_directory(src, sink)
        windows = read_windows_for(directory, text, trust_remote_code, os.fspath(src))

        def prepare(model: Any) -> Task:
            fitting = fit_windows(model, windows, may_cut=text.length is None)
            layers = _layers(model)
            widths = [(features_of(layer) or (0, 0))[0] for layer in layers.values()] if with_moments else []
            begin_folder(folder, moments_bytes(widths))
            return Task(layers, fitting, _n_held_out(*fitting.ids.shape) if with_moments else 0)

        options = RunOptions(
            threshold, used, trust_remote_code, moments=folder if with_moments else None, on_event=sink
        )
        try:
            readings = read_inputs(directory, prepare, options)
            calibration = _describe(src, directory, readings, threshold)
            write_calibration(folder, calibration)
        except OSError as error:
            raise as_output_error(error, folder) from error
    return calibration


def _layers(model: Any) -> Mapping[str, nn.Module]:
    """Return the int8 layers by name; of a model without any, all layers but its output head and those in FP8."""
    head = model.get_output_embeddings()
    found = {name: module for name, module in model.named_modules() if features_of(module) is not None}
    int8 = {name: module for name, module in found.items() if isinstance(module, Int8Linear)}
    return int8 or {
        name: module for name, module in found.items() if module is not head and module.weight.dtype in _DTYPES
    }


def _n_held_out(n_windows: int, length: int) -> int:
    """Return how many windows are held out: a quarter, but 1,024 tokens at most; one of two windows at least."""
    return min(max(1, n_windows // 4), max(1, MAX_HELD_OUT // length)) if n_windows > 1 else 0


def _describe(src: str | os.PathLike[str], directory: Path, readings: Readings, threshold: float) -> Calibration:
    windows = readings.task.windows
    ran = {name for entry in readings.recorder.inputs for name in entry.modules}
    return Calibration(
        source=os.fspath(src),
        config_sha256=json_sha256(open_source(directory).config),
        text=windows.text,
        text_sha256=windows.text_sha256,
        n_sequences=len(windows.ids),
        length=windows.ids.shape[1],
        n_held_out=readings.task.n_held_out,
        threshold=threshold,
        inputs=tuple(readings.recorder.inputs),
        statistics={name: seen for name, seen in readings.statistics.items() if name in ran},
        weights={name: weight for name, weight in readings.weights.items() if name in ran},
    )
