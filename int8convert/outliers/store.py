"""Stores the static outlier set of an int8 checkpoint: chosen columns of the source's weights, before rounding.

1. The plan of the conversion says where each weight is in the source, and how it becomes [out, in]: transposed, one
   expert of many, decoded from FP8, merged with an adapter.
2. Rows are read block by block. The chosen columns are kept and compared with the codes in OUT: every value must be
   near what its code stands for, else the two checkpoints do not belong together.
3. Columns are written as they are read, to a temporary file that becomes `int8convert/outliers.safetensors` at the end.

Costs the reading of these weights in both checkpoints, and the memory of one block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.atomic import as_output_error, make_folder
from int8convert.checkpoint.floats import convert_floats, widen
from int8convert.checkpoint.lock import DirectoryLock
from int8convert.checkpoint.names import MAX_STEPS_AWAY, OUTLIERS_FILE, SMOOTHING_FILE
from int8convert.checkpoint.rows import Scratch
from int8convert.checkpoint.safetensors_file import METADATA_NAME, FileMetadata
from int8convert.checkpoint.shard_writer import ShardWriter, order_for_alignment
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES
from int8convert.conversion.source_rows import SourceRows, values_dtype
from int8convert.errors import NOTHING_WRITTEN, SourceError, stating
from int8convert.formats.format import Format, TensorSpecs
from int8convert.formats.int8_checkpoint import Int8Checkpoint, Int8Weight, SourceReaders, open_int8_checkpoint
from int8convert.formats.modules import module_of
from int8convert.planning.plan import PlannedTensor
from int8convert.planning.plan_checkpoint import PlanOptions, plan
from int8convert.planning.recorded_request import read_recorded_request
from int8convert.sources import open_source
from int8convert.text import quoted


@dataclass(frozen=True, slots=True)
class StaticSet:
    """A static set that was written."""

    path: str
    n_modules: int
    n_columns: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class _ChosenColumns:
    """Columns of one weight.

    Attributes:
        columns: int32 [n], ascending, at least one.
        tensor, weight: the weight in the source, and in the int8 checkpoint.
    """

    name: str
    columns: npt.NDArray[np.int32]
    tensor: PlannedTensor
    weight: Int8Weight

    @property
    def dtype(self) -> str:
        """The source's dtype; float64 is rounded to float32, as in quantization."""
        dtype = values_dtype(self.tensor)
        return "F32" if dtype == "F64" else dtype

    @property
    def specs(self) -> TensorSpecs:
        n = len(self.columns)
        return {
            f"{self.name}.outlier_columns": ("I32", (n,)),
            f"{self.name}.outlier_weight": (self.dtype, (self.tensor.shape[0], n)),
        }


def int8_modules(out: str | os.PathLike[str]) -> list[str]:
    """Return the int8 modules of an int8 checkpoint, as its tensors name them."""
    return [weight.module_name for weight in open_int8_checkpoint(open_source(out)).weights]


@stating(NOTHING_WRITTEN)
def store_outliers(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    columns: Mapping[str, Sequence[int]],
    calibration: Mapping[str, Any] | None = None,
    *,
    lora: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> StaticSet:
    """Store columns of a source's weights in its int8 checkpoint; `int8convert.load` then uses them.

    Args:
        src: the source.
        out: the int8 checkpoint; its present set is replaced.
        columns: module name as in `out` -> its columns, ascending; modules without any are left out.
        calibration: how the columns were chosen, stored in the file as JSON.
        lora: the adapter that was merged when `out` was made.
        trust_remote_code: run code in the source, as `quantize` does.
        revision: the converted revision of a source on the Hub.

    Raises:
        SourceError: one of the two is no such checkpoint, or they do not belong together.
        OutputError: `out` cannot be written to, or another process uses it.
        ValueError: columns are negative, or not ascending.
    """
    checkpoint = open_int8_checkpoint(open_source(out))
    chosen = _find(src, checkpoint, columns, lora, trust_remote_code, revision)
    specs = order_for_alignment({name: spec for place in chosen for name, spec in place.specs.items()})
    if calibration is not None:
        specs = {METADATA_NAME: FileMetadata({"calibration": json.dumps(calibration)}), **specs}
    path = checkpoint.source.directory / OUTLIERS_FILE
    try:
        make_folder(path.parent)
        with DirectoryLock(path.parent / "lock"), SourceReaders() as readers:
            writer = ShardWriter(path, specs)
            try:
                for place in chosen:
                    _write(place, checkpoint.format, writer, readers)
                writer.commit()
            finally:
                writer.discard()
    except OSError as error:
        raise as_output_error(error, path.parent) from error
    return StaticSet(str(path), len(chosen), sum(len(place.columns) for place in chosen), writer.n_bytes)


def _find(
    src: str | os.PathLike[str],
    checkpoint: Int8Checkpoint,
    columns: Mapping[str, Sequence[int]],
    lora: str | os.PathLike[str] | None,
    trust_remote_code: bool,
    revision: str | None,
) -> list[_ChosenColumns]:
    """Find the weights, in the order of the source's files."""
    planned_as = module_of(checkpoint.format).PLANNED_AS
    request = read_recorded_request(checkpoint.source.directory)
    options = PlanOptions(
        format=planned_as,
        lora=lora,
        rotate=request is not None and request.rotate,
        rotate_inputs=request is not None and request.rotate_inputs,
        round_source=request.round_source if request is not None else None,
        smooth=checkpoint.source.directory / SMOOTHING_FILE if request is not None and request.smooth else None,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    planned = plan(src, options)
    sources = {t.output_name.removesuffix(".weight"): t for t in planned.tensors if t.output_name.endswith(".weight")}
    weights = {weight.module_name: weight for weight in checkpoint.weights}
    chosen = {name: np.asarray(found, np.int32) for name, found in columns.items() if len(found)}
    for name, found in chosen.items():
        if found[0] < 0 or not (np.diff(found) > 0).all():
            raise ValueError(f"columns of {name!r} must be ascending and not negative, found {found.tolist()}")
        shape = weights[name].codes.stored.shape if name in weights else None
        if shape is None or name not in sources or sources[name].shape != shape or found[-1] >= shape[1]:
            raise SourceError(
                f"'{os.fspath(src)}' and '{checkpoint.source.label}' do not belong together: "
                f"{quoted(name)} is {_shown(shape)} in the latter, "
                f"{_shown(sources[name].shape if name in sources else None)} in the former",
                "give the checkpoint that was converted",
            )
    return [_ChosenColumns(n, chosen[n], tensor, weights[n]) for n, tensor in sources.items() if n in chosen]


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _write(place: _ChosenColumns, format: Format, writer: ShardWriter, readers: SourceReaders) -> None:
    """Write the two tensors of a weight, block by block."""
    writer.write(f"{place.name}.outlier_columns", place.columns.view(np.uint8).data)
    step = module_of(format).to_scale(readers.read_scale(place.weight.scale))
    rows, scratch = SourceRows(place.tensor), Scratch()
    for begin, end in rows.ranges():
        with readers.reading(place.tensor.shard) as reader:
            block = rows.read(reader, begin, end, scratch)
        values = np.ascontiguousarray(rows.values(block, begin, end)[:, place.columns])
        _check(place, widen(values, rows.dtype), _codes(place, readers, begin, end), step[begin:end], begin)
        data = values.reshape(-1).view(np.uint8)
        if place.dtype != rows.dtype:
            data = convert_floats(data, rows.dtype, place.dtype)
        at = begin * len(place.columns) * DTYPE_BYTES[place.dtype]
        writer.write(f"{place.name}.outlier_weight", data.data, at)


def _codes(place: _ChosenColumns, readers: SourceReaders, begin: int, end: int) -> npt.NDArray[np.int8]:
    n_columns = place.weight.codes.stored.shape[1]
    codes = np.empty((end - begin, n_columns), np.int8)
    readers.read(place.weight.codes, codes.reshape(-1).view(np.uint8).data, begin * n_columns)
    return codes[:, place.columns]


def _check(
    place: _ChosenColumns,
    values: npt.NDArray[np.float32],
    codes: npt.NDArray[np.int8],
    step: npt.NDArray[np.float32],
    begin: int,
) -> None:
    """Check weights against codes: those that do not belong together differ by many steps somewhere."""
    rounded = codes * step[:, None]
    is_near = np.abs(values - rounded) <= MAX_STEPS_AWAY * step[:, None]
    if not is_near.all():
        row, i = np.unravel_index(int(np.argmin(is_near)), is_near.shape)
        raise SourceError(
            f"the source is not that of the int8 checkpoint: {quoted(place.name)} holds {values[row, i]:.4g} "
            f"at row {begin + int(row):,}, column {int(place.columns[i]):,}, its int8 form {rounded[row, i]:.4g}",
            "give the checkpoint that was converted, with --lora if an adapter was merged",
        )
