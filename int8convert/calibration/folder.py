"""The folder of a calibration: statistics of what the Linear layers of a model read, and on request second moments.

    calibration.json          the text, the source, and the inputs; layers that read the same tensor share one
    statistics.safetensors    for each layer NAME: the sums of `InputStatistics` as NAME.maximum etc.; NAME.n_tokens
                              int64 []; the sums of its weight, NAME.weight_squares float64 [in] and
                              NAME.weight_step_squares float64 []
    moments/NNNN.safetensors  for one input: second_moment float32 [in, in], the sum over tokens of x x^T; and held_out
                              float32 [tokens, in], the input at tokens that are not in that sum

NAME is the layer's name in the live model of the source. Layers that did not run on the text are left out.
calibration.json is written last, so a folder that has it is complete. The reader trusts nothing in the folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from int8convert.calibration.statistics import InputStatistics
from int8convert.calibration.weight_squares import WeightSquares
from int8convert.checkpoint.atomic import INCOMPLETE_SUFFIX, make_folder, write_json
from int8convert.checkpoint.hashing import json_sha256
from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.safetensors_file import read_safetensors_header
from int8convert.checkpoint.shard_writer import ShardWriter, order_for_alignment
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.utf8_path import utf8_path
from int8convert.errors import CorruptFileError, DiskFullError, OutputError, SourceError
from int8convert.text import format_bytes, quoted

SCHEMA = 1
RECORD = "calibration.json"
_STATISTICS = "statistics.safetensors"
_MOMENTS = "moments"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_AGAIN = "write it again with int8convert calibrate"


@dataclass(frozen=True, slots=True)
class CalibratedInput:
    """A tensor that one layer reads, or several.

    Attributes:
        modules: names of these layers.
        n_tokens: number of tokens in the second moment; of all tokens where there is none.
        moments: the name of the file in moments/; None if second moments were not asked for, or if the input is wider
            than `moments.MAX_WIDTH`.
    """

    modules: tuple[str, ...]
    in_features: int
    n_tokens: int
    moments: str | None


@dataclass(frozen=True, slots=True)
class Moments:
    """The second moments of one input.

    Attributes:
        second_moment: float32 [in, in], the sum over tokens of x x^T.
        held_out: float32 [tokens, in], inputs of other tokens, at most 1,024.
    """

    second_moment: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration, without its second moments: see `read_moments`.

    Attributes:
        source: the checkpoint that ran, as the user named it.
        config_sha256: sha256 of the source's config as JSON with sorted keys.
        text, text_sha256: file name and hash of the text.
        n_sequences, length: number of windows, and tokens of each.
        n_held_out: windows, the last ones, that are in the statistics and not in the second moments.
        threshold: magnitude from which a value is an outlier.
        statistics: layer -> sums over all windows, on the CPU.
        weights: layer -> sums of its weight.
    """

    source: str
    config_sha256: str
    text: str
    text_sha256: str
    n_sequences: int
    length: int
    n_held_out: int
    threshold: float
    inputs: tuple[CalibratedInput, ...]
    statistics: Mapping[str, InputStatistics] = field(repr=False)
    weights: Mapping[str, WeightSquares] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return the content of calibration.json."""
        names = [name for name in self.__slots__ if name not in ("inputs", "statistics", "weights")]
        fields = {name: getattr(self, name) for name in names}
        return {"schema": SCHEMA, **fields, "inputs": [asdict(entry) for entry in self.inputs]}


def begin_folder(folder: Path, n_bytes: int = 0) -> None:
    """Make a folder for a calibration, and invalidate an earlier calibration in it.

    Args:
        n_bytes: room that second moments need.

    Raises:
        OutputError: the folder holds other files, or is no directory.
        DiskFullError: its disk has less room.
    """
    make_folder(folder)
    names = {path.name.removesuffix(INCOMPLETE_SUFFIX) for path in folder.iterdir()}
    if others := names - {RECORD, _STATISTICS, _MOMENTS}:
        raise OutputError(f"'{folder}' holds other files, such as {quoted(min(others))}", "name a new folder")
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise DiskFullError(
            f"second moments take up to {format_bytes(n_bytes)}, and the disk of '{folder}' has "
            f"{format_bytes(free)} left",
            "name a folder on another disk, or leave out --moments",
        )
    (folder / RECORD).unlink(missing_ok=True)
    make_folder(folder / _MOMENTS)
    for path in (folder / _MOMENTS).glob("*.safetensors*"):
        path.unlink()


def write_moments(folder: Path, number: int, moments: Moments) -> str:
    """Write the second moments of an input; return the file's name."""
    name = f"{number:04}.safetensors"
    _write_tensors(folder / _MOMENTS / name, {"second_moment": moments.second_moment, "held_out": moments.held_out})
    return name


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Write statistics and record, which completes the folder."""
    tensors: dict[str, torch.Tensor] = {}
    for name, seen in calibration.statistics.items():
        weight = calibration.weights[name]
        sums = seen.sums | {
            "n_tokens": torch.tensor(seen.n_tokens),
            "weight_squares": weight.columns,
            "weight_step_squares": torch.tensor(weight.steps, dtype=torch.float64),
        }
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in sums.items()}
    _write_tensors(folder / _STATISTICS, tensors)
    write_json(folder / RECORD, calibration.record())


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    specs = {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = ShardWriter(path, order_for_alignment(specs))
    try:
        for name in order_for_alignment(specs):
            writer.write(name, np.ascontiguousarray(tensors[name].numpy()).reshape(-1).view(np.uint8).data)
        writer.commit()
    finally:
        writer.discard()


def is_calibration(folder: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder with a complete calibration."""
    return (Path(folder) / RECORD).is_file()


def read_calibration(folder: str | os.PathLike[str], source: CheckpointSource | None = None) -> Calibration:
    """Read a calibration folder.

    Args:
        source: the checkpoint that must be the calibrated one; None for any.

    Raises:
        CorruptFileError: a file is damaged, or holds something else.
        SourceError: the folder holds no complete calibration, or one of another source.
    """
    folder = Path(folder)
    if not is_calibration(folder):
        raise SourceError(f"'{folder}' holds no complete calibration", "make one with int8convert calibrate")
    record = read_own_json(folder / RECORD)
    if record.get("schema") != SCHEMA:
        raise CorruptFileError(
            f"'{folder / RECORD}' has schema {quoted(str(record.get('schema')), 40)}, expected {SCHEMA}", _AGAIN
        )
    fields, inputs = _read_record(folder, record)
    if source is not None and fields["config_sha256"] != json_sha256(source.config):
        raise SourceError(
            f"'{folder}' is the calibration of {quoted(fields['source'], 200)}, whose config is not that of "
            f"{quoted(source.label, 200)}",
            "calibrate this source with int8convert calibrate",
        )
    statistics, weights = _read_statistics(folder / _STATISTICS, inputs, fields["threshold"])
    return Calibration(**fields, inputs=inputs, statistics=statistics, weights=weights)


def read_moments(folder: str | os.PathLike[str], entry: CalibratedInput) -> Moments | None:
    """Read the second moments of an input, which need 4 * in^2 bytes; None if the folder has none.

    Raises:
        CorruptFileError: the file is damaged, or holds other shapes.
    """
    if entry.moments is None:
        return None
    path, n = Path(folder) / _MOMENTS / entry.moments, entry.in_features
    tensors = _read_tensors(path)
    second, held_out = tensors.get("second_moment"), tensors.get("held_out")
    if (
        second is None
        or held_out is None
        or (second.shape, held_out.shape[1:]) != ((n, n), (n,))
        or {second.dtype, held_out.dtype} != {torch.float32}
    ):
        raise CorruptFileError(f"'{path}' does not hold the moments of an input with {n:,} features", _AGAIN)
    return Moments(second, held_out)


def _read_record(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[CalibratedInput, ...]]:
    types = {"source": str, "config_sha256": str, "text": str, "text_sha256": str, "threshold": float}
    fields = {name: record.get(name) for name in (*types, "n_sequences", "length", "n_held_out")}
    if isinstance(fields["threshold"], int):
        fields["threshold"] = float(fields["threshold"])
    is_right = all(isinstance(value, types.get(name, int)) for name, value in fields.items())
    entries = record.get("inputs")
    if not is_right or not isinstance(entries, list):
        raise _not_a_record(folder)
    inputs = tuple(_read_input(folder, entry) for entry in entries)
    modules = [name for entry in inputs for name in entry.modules]
    if len(set(modules)) != len(modules):
        raise _not_a_record(folder)
    return fields, inputs


def _read_input(folder: Path, entry: Any) -> CalibratedInput:
    match entry:
        case {
            "modules": [str(), *_] as modules,
            "in_features": int(in_features),
            "n_tokens": int(n_tokens),
            "moments": str() | None as moments,
        }:
            is_name = moments is None or (moments.removesuffix(".safetensors").isdecimal() and moments.isascii())
            if all(isinstance(name, str) for name in modules) and in_features > 0 and n_tokens >= 0 and is_name:
                return CalibratedInput(tuple(modules), in_features, n_tokens, moments)
    raise _not_a_record(folder)


def _not_a_record(folder: Path) -> CorruptFileError:
    return CorruptFileError(f"'{folder / RECORD}' lacks a field, or holds a value of another kind", _AGAIN)


def _read_statistics(
    path: Path, inputs: tuple[CalibratedInput, ...], threshold: float
) -> tuple[dict[str, InputStatistics], dict[str, WeightSquares]]:
    tensors = _read_tensors(path)
    statistics, weights = {}, {}
    for entry in inputs:
        for name in entry.modules:
            output_sum = tensors.get(f"{name}.output_sum")
            n_rows = len(output_sum) if output_sum is not None and output_sum.dim() == 1 else 0
            seen = InputStatistics(entry.in_features, n_rows, threshold, torch.device("meta"))
            expected = seen.sums | {
                "n_tokens": torch.empty((), dtype=torch.int64),
                "weight_squares": seen.sum_squares,
                "weight_step_squares": seen.step_squares,
            }
            found = {leaf: _take(path, tensors, f"{name}.{leaf}", like) for leaf, like in expected.items()}
            seen.n_tokens = int(found.pop("n_tokens"))
            weights[name] = WeightSquares(n_rows, found.pop("weight_squares"), float(found.pop("weight_step_squares")))
            for leaf, tensor in found.items():
                setattr(seen, leaf, tensor)
            statistics[name] = seen
    if tensors:
        raise CorruptFileError(f"'{path}' holds {quoted(min(tensors))}, which no input of its record has", _AGAIN)
    return statistics, weights


def _take(path: Path, tensors: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        found = "nothing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
        raise CorruptFileError(
            f"'{path}' holds {found} for {quoted(name)}, expected {list(like.shape)} of {like.dtype}", _AGAIN
        )
    return tensor


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        read_safetensors_header(path)  # describes what is wrong with a file in another format
    except OSError as error:
        raise CorruptFileError(f"'{path}' cannot be read: {error.strerror}", _AGAIN) from error
    with safe_open(utf8_path(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
