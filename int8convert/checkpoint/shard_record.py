"""The record of one finished shard, and of each tensor in it: the entries of `manifest.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from int8convert.checkpoint.stored_tensor import is_size


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The outcome for one tensor.

    Attributes:
        reason: why it did not become int8; None if it did.
        sqnr_db: signal to quantization noise; None if kept, or if nothing was lost.
        absmax_min, absmax_max: range of the rows' absmax; None if kept.
        n_non_finite: values of a kept tensor that are NaN or infinite.
        n_zero_rows: rows that hold nothing but zeros; of a kept tensor, those in long stretches of them.
    """

    source: str
    dtype: str
    reason: str | None = None
    sqnr_db: float | None = None
    absmax_min: float | None = None
    absmax_max: float | None = None
    n_non_finite: int = 0
    n_zero_rows: int = 0


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        plan_sha256: digest of the plan it was written by.
        sources: source file -> sha256, of those whose last tensor is in this shard.
        tensors: output name -> its record.
    """

    file_name: str
    n_bytes: int
    sha256: str
    plan_sha256: str
    sources: dict[str, str]
    tensors: dict[str, TensorRecord]


def parse_record(value: Any) -> ShardRecord | None:
    """Return the record in a JSON value; None if the value is no record."""
    try:
        tensors = {name: TensorRecord(**tensor) for name, tensor in value["tensors"].items()}
        record = ShardRecord(**{**value, "tensors": tensors})
    except (TypeError, KeyError, AttributeError):
        return None
    is_named = isinstance(record.file_name, str) and record.file_name.isprintable()
    is_whole = is_size(record.n_bytes) and isinstance(record.sha256, str) and isinstance(record.plan_sha256, str)
    is_whole = is_whole and isinstance(record.sources, dict) and all(map(_is_tensor_record, tensors.values()))
    return record if is_named and is_whole else None


def _is_tensor_record(tensor: TensorRecord) -> bool:
    """Return whether a record holds texts, a size, and numbers that a float holds."""
    numbers = (tensor.sqnr_db, tensor.absmax_min, tensor.absmax_max)
    are_numbers = all(n is None or type(n) is float or (type(n) is int and abs(n) < 10**300) for n in numbers)
    are_texts = all(type(text) is str for text in (tensor.source, tensor.dtype, tensor.reason or ""))
    return are_numbers and are_texts and is_size(tensor.n_non_finite)
