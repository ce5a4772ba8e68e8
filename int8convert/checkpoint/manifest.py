"""The records of a conversion: the folder `int8convert/` inside OUT.

    conversion.json     while it runs: the request, by which a rerun recognizes its own job
    shards/NAME.json    while it runs: one record for each finished shard, written after the shard is renamed
    manifest.json       at the end: request and records in one file; the other two are removed
    local.json          at the end: the path of a local source; never published

Every file appears whole or not at all. No file but `local.json` holds times or paths: the same conversion writes the
same bytes, and publishing them reveals nothing about the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import INCOMPLETE_SUFFIX, make_folder, write_json
from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import OWN_FOLDER, find_file
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError

ARITHMETIC_VERSION = 1
"""Version of the arithmetic, raised when the same source and options give other bytes. Versions are never mixed."""

EXPORT_ARITHMETIC_VERSION = 1
"""Version of the arithmetic of exports: how scales are recoded and codes dequantized."""

_REQUEST_NAME = "conversion.json"
_MANIFEST_NAME = "manifest.json"
_RECORDS_FOLDER = "shards"
_LOCAL_NAME = "local.json"

NOT_PUBLISHED = (_REQUEST_NAME, _RECORDS_FOLDER, _LOCAL_NAME)
"""Files and folders of the records that are never published."""


class Manifest:
    """The records of one output directory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out / OWN_FOLDER
        self.records_folder = self.folder / _RECORDS_FOLDER

    def _find(self, name: str) -> Path | None:
        """Return a file of the folder; None if it is missing, or is a link out of the checkpoint."""
        try:
            return find_file(self._out, f"{OWN_FOLDER}/{name}")
        except SourceError:
            return None

    @property
    def is_complete(self) -> bool:
        return self._find(_MANIFEST_NAME) is not None

    def read_request(self) -> dict[str, Any] | None:
        """Return the request of the conversion that is there, finished or not; None if there is none."""
        try:
            if (begun := self._find(_REQUEST_NAME)) is not None:
                return _with_version(read_own_json(begun))
            if (finished := self._find(_MANIFEST_NAME)) is not None:
                request = read_own_json(finished).get("conversion")
                return _with_version(request) if isinstance(request, dict) else None
        except CorruptFileError:
            pass  # not written by us
        return None

    def read_source(self) -> str | None:
        """Return the source of a finished conversion; None if it is unknown.

        It is a repository's name, or a directory: its path on the machine of the conversion, its name elsewhere.
        """
        if not self.is_complete:
            return None
        for name in (_LOCAL_NAME, _MANIFEST_NAME):
            if (path := self._find(name)) is not None:
                named = read_own_json(path).get("source")
                if isinstance(named, str):
                    return named
        return None

    def read_commit(self) -> str | None:
        """Return the commit of the repository that was converted; None for a directory, or if it is unknown."""
        source = (self.read_request() or {}).get("source")
        commit = source.get("commit") if isinstance(source, dict) else None
        return commit if isinstance(commit, str) else None

    def begin(self, request: Mapping[str, Any]) -> None:
        """Record the request, before the first shard."""
        make_folder(self.records_folder)
        write_json(self.folder / _REQUEST_NAME, request)

    def reopen(self, request: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
        """Turn a finished conversion into an unfinished one with these finished shards."""
        self.begin(request)
        for record in records:
            self.add(record)
        (self.folder / _MANIFEST_NAME).unlink()

    def add(self, record: ShardRecord) -> None:
        """Record a shard that is on the disk under its final name."""
        write_json(self.records_folder / f"{record.file_name}.json", record.to_json())

    def read_records(self) -> dict[str, ShardRecord]:
        """Return file name -> record of the finished shards, without records that cannot be read."""
        if self.is_complete and self._find(_REQUEST_NAME) is None:
            return self.read_finished_records()
        return {record.file_name: record for record in self._unfinished_records()}

    def read_finished_records(self) -> dict[str, ShardRecord]:
        """Return file name -> record of the manifest's shards. Records of an unfinished conversion are ignored."""
        finished = self._find(_MANIFEST_NAME)
        entries = read_own_json(finished).get("shards") if finished is not None else []
        found = map(parse_record, entries if isinstance(entries, list) else [])
        return {record.file_name: record for record in found if record}

    def _unfinished_records(self) -> Iterator[ShardRecord]:
        for entry in sorted(self.records_folder.glob("*.json")):
            path = self._find(f"{_RECORDS_FOLDER}/{entry.name}")
            try:
                record = parse_record(read_own_json(path)) if path is not None else None
            except CorruptFileError:
                continue
            if record is not None:
                yield record

    def complete(
        self,
        request: Mapping[str, Any],
        source: CheckpointSource,
        summary: Mapping[str, Any],
        records: list[ShardRecord],
        auxiliary: Mapping[str, str],
    ) -> None:
        """Write the files that remain.

        Args:
            auxiliary: path with `/` of each copied file -> sha256.
        """
        name = source.label
        if source.commit is None:
            place = source.directory.resolve()
            name = place.name
            write_json(self.folder / _LOCAL_NAME, {"source": str(place)})
        shards = [record.to_json() for record in records]
        whole = {"schema": 1, "conversion": request, "source": name, "source_revision": source.commit, **summary}
        write_json(
            self.folder / _MANIFEST_NAME, {**whole, "carried": dict(sorted(auxiliary.items())), "shards": shards}
        )

    def tidy(self) -> None:
        """Remove what only an unfinished conversion needs, after everything else is on the disk."""
        (self.folder / _REQUEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.records_folder, ignore_errors=True)

    def remove(self) -> None:
        for name in (_MANIFEST_NAME, _LOCAL_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for leftover in self.folder.glob(f"*{INCOMPLETE_SUFFIX}"):
            leftover.unlink()
        self.tidy()


def _with_version(request: dict[str, Any]) -> dict[str, Any]:
    """Add the version that the first exports did not record; a conversion to int8 has `arithmetic`."""
    return request if "arithmetic" in request else {"export_arithmetic": 1, **request}


@dataclass(frozen=True, slots=True)
class CalibratedRows:
    """The outcome of calibrated rounding for one tensor; see `events.TensorQuantized`."""

    n_accepted: int
    nearest_error: float
    error: float


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The outcome for one tensor.

    Attributes:
        reason: why it did not become int8; None if it did.
        sqnr_db: signal to quantization noise; None if kept, or if nothing was lost.
        absmax_min, absmax_max: range of the rows' absmax; None if kept.
        n_non_finite: values of a kept tensor that are NaN or infinite.
        n_zero_rows: rows that hold nothing but zeros; of a kept tensor, those in long stretches of them.
        rounding: what calibrated rounding did; None if the tensor is not rounded by a calibration.
    """

    source: str
    dtype: str
    reason: str | None = None
    sqnr_db: float | None = None
    absmax_min: float | None = None
    absmax_max: float | None = None
    n_non_finite: int = 0
    n_zero_rows: int = 0
    rounding: CalibratedRows | None = None


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        plan_sha256: digest of the plan it was written by.
        sources: source file -> sha256, of those whose last tensor is in this shard and whose sha256 was known before.
        tensors: output name -> its record.
    """

    file_name: str
    n_bytes: int
    sha256: str
    plan_sha256: str
    sources: dict[str, str]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, in which only tensors that have a `rounding` hold that entry."""
        fields = asdict(self)
        for tensor in fields["tensors"].values():
            if tensor["rounding"] is None:
                del tensor["rounding"]
        return fields


def parse_record(value: Any) -> ShardRecord | None:
    """Return the record in a JSON value; None if the value is no record."""
    try:
        tensors = {name: _parse_tensor(tensor) for name, tensor in value["tensors"].items()}
        record = ShardRecord(**{**value, "tensors": tensors})
    except (TypeError, KeyError, AttributeError):
        return None
    is_named = isinstance(record.file_name, str) and record.file_name.isprintable()
    is_whole = is_size(record.n_bytes) and isinstance(record.sha256, str) and isinstance(record.plan_sha256, str)
    is_whole = is_whole and isinstance(record.sources, dict) and all(map(_is_tensor_record, tensors.values()))
    return record if is_named and is_whole else None


def _parse_tensor(value: Any) -> TensorRecord:
    found = value.get("rounding")
    return TensorRecord(**{**value, "rounding": None if found is None else CalibratedRows(**found)})


def _is_tensor_record(tensor: TensorRecord) -> bool:
    """Return whether a record holds texts, a size, and numbers that a float holds."""
    numbers: tuple[float | None, ...] = (tensor.sqnr_db, tensor.absmax_min, tensor.absmax_max)
    if tensor.rounding is not None:
        numbers += (tensor.rounding.nearest_error, tensor.rounding.error)
    are_numbers = all(n is None or type(n) is float or (type(n) is int and abs(n) < 10**300) for n in numbers)
    are_texts = all(type(text) is str for text in (tensor.source, tensor.dtype, tensor.reason or ""))
    sizes = (tensor.n_non_finite, tensor.rounding.n_accepted if tensor.rounding else 0)
    return are_numbers and are_texts and all(map(is_size, sizes))
