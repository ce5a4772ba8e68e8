"""What was done to a checkpoint, and how far it got: the folder `int8convert/` inside OUT.

    conversion.json     while it runs: what was asked for, by which a rerun knows that it continues the same job
    shards/NAME.json    while it runs: one record for each finished shard, written after the shard has its name
    manifest.json       at the end: all of it in one file; the other two go
    local.json          at the end: where the source is on this machine, if it is here; never published

Every file appears whole or not at all, and each shard has a record of its own, so that several processes could work on
one OUT. No other file holds the time of the conversion or where it ran: the same conversion writes the same bytes, and
who publishes them tells nothing of the machine.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8convert.checkpoint.atomic import INCOMPLETE_SUFFIX, make_folder, write_json
from int8convert.checkpoint.file_reader import FileIdentity
from int8convert.checkpoint.json_file import read_own_json
from int8convert.checkpoint.names import OWN_FOLDER, find_file
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.checkpoint.stored_tensor import is_size
from int8convert.errors import CorruptFileError, SourceError
from int8convert.text import quoted

ARITHMETIC_VERSION = 1
"""Raised when the same source and options would give other bytes; shards of two versions are never mixed."""

_REQUEST_NAME = "conversion.json"
_MANIFEST_NAME = "manifest.json"
_RECORDS_FOLDER = "shards"
_LOCAL_NAME = "local.json"

NOT_PUBLISHED = (_REQUEST_NAME, _RECORDS_FOLDER, _LOCAL_NAME)
"""Of the folder: what is of no use elsewhere."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What became of one tensor.

    Attributes:
        source: its name there.
        dtype: as written.
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
        n_bytes, sha256: of the file.
        plan_sha256: digest of the plan it was written by.
        sources: source file -> sha256, of those whose last tensor is in this shard.
        tensors: output name -> what became of it.
    """

    file_name: str
    n_bytes: int
    sha256: str
    plan_sha256: str
    sources: dict[str, str]
    tensors: dict[str, TensorRecord]


class Manifest:
    """The records of one output directory."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.folder = out / OWN_FOLDER
        self.records_folder = self.folder / _RECORDS_FOLDER

    def _find(self, name: str) -> Path | None:
        """A file of the folder; None if it is missing, or leads out of the checkpoint, which no file of ours does."""
        try:
            return find_file(self._out, f"{OWN_FOLDER}/{name}")
        except SourceError:
            return None

    @property
    def is_complete(self) -> bool:
        return self._find(_MANIFEST_NAME) is not None

    def read_request(self) -> dict[str, Any] | None:
        """What was asked of the conversion that is there, finished or not; None if there is none."""
        try:
            if (begun := self._find(_REQUEST_NAME)) is not None:
                return read_own_json(begun)
            if (finished := self._find(_MANIFEST_NAME)) is not None:
                request = read_own_json(finished).get("conversion")
                return request if isinstance(request, dict) else None
        except CorruptFileError:
            pass  # not written by us
        return None

    def read_source(self) -> str | None:
        """The source of a finished conversion: a repository's name, or a directory's path as long as the conversion
        lies where it was made, and its name elsewhere; None if that is not known."""
        if not self.is_complete:
            return None
        for name in (_LOCAL_NAME, _MANIFEST_NAME):
            if (path := self._find(name)) is not None:
                named = read_own_json(path).get("source")
                if isinstance(named, str):
                    return named
        return None

    def read_commit(self) -> str | None:
        """The commit of the repository on the Hub that was converted; None if it was a directory, or is not known."""
        source = (self.read_request() or {}).get("source")
        commit = source.get("commit") if isinstance(source, dict) else None
        return commit if isinstance(commit, str) else None

    def begin(self, request: Mapping[str, Any]) -> None:
        """Write down what is asked for, before the first shard."""
        make_folder(self.records_folder)
        write_json(self.folder / _REQUEST_NAME, request)

    def reopen(self, request: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
        """Make a finished conversion an unfinished one, of which these shards are done."""
        self.begin(request)
        for record in records:
            self.add(record)
        (self.folder / _MANIFEST_NAME).unlink()

    def add(self, record: ShardRecord) -> None:
        """Write down a shard that is on the disk under its name."""
        write_json(self.records_folder / f"{record.file_name}.json", asdict(record))

    def read_records(self) -> dict[str, ShardRecord]:
        """File name -> record of the finished shards. A record that cannot be read counts as none."""
        if self.is_complete and self._find(_REQUEST_NAME) is None:
            return self.read_finished_records()
        return {record.file_name: record for record in self._unfinished_records()}

    def read_finished_records(self) -> dict[str, ShardRecord]:
        """File name -> record of the manifest's shards, whatever an unfinished conversion has left beside it."""
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
        carried: Mapping[str, str],
    ) -> None:
        """Write the files that stay.

        Args:
            carried: file that was copied from the source, by its path with `/` -> sha256.
        """
        name = source.label
        if source.commit is None:
            place = source.directory.resolve()
            name = place.name
            write_json(self.folder / _LOCAL_NAME, {"source": str(place)})
        shards = [asdict(record) for record in records]
        whole = {"schema": 1, "conversion": request, "source": name, "source_revision": source.commit, **summary}
        write_json(self.folder / _MANIFEST_NAME, {**whole, "carried": dict(sorted(carried.items())), "shards": shards})

    def tidy(self) -> None:
        """Remove what only an unfinished conversion needs; after everything else is on the disk."""
        (self.folder / _REQUEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(self.records_folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove all that is written down."""
        for name in (_MANIFEST_NAME, _LOCAL_NAME):
            (self.folder / name).unlink(missing_ok=True)
        for leftover in self.folder.glob(f"*{INCOMPLETE_SUFFIX}"):
            leftover.unlink()
        self.tidy()


def parse_record(value: Any) -> ShardRecord | None:
    """A record from its JSON; None if it is none."""
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
    """Whether a record that was read holds what it promises: texts, a size, and numbers that a float holds."""
    numbers = (tensor.sqnr_db, tensor.absmax_min, tensor.absmax_max)
    are_numbers = all(n is None or type(n) is float or (type(n) is int and abs(n) < 10**300) for n in numbers)
    are_texts = all(type(text) is str for text in (tensor.source, tensor.dtype, tensor.reason or ""))
    return are_numbers and are_texts and is_size(tensor.n_non_finite)


def describe_source(source: CheckpointSource) -> dict[str, Any]:
    """What identifies the bytes of a source short of reading them: sizes, times of change, headers, config; of a
    repository on the Hub its commit, and nothing of how it is read."""
    described = {
        "config_sha256": _json_sha256(source.config),
        "files": {shard.path.name: _describe_shard(shard, source.commit is None) for shard in source.shards},
    }
    return {"repository": source.label, "commit": source.commit, **described} if source.commit else described


def _describe_shard(shard: SourceShard, has_time: bool) -> dict[str, Any]:
    header = [[t.name, t.dtype, t.shape, t.offset, t.strides] for t in shard.tensors]
    described = {"n_bytes": shard.n_bytes, "header_sha256": _json_sha256(header)}
    return described | ({"mtime_ns": (shard.identity or FileIdentity.of(shard.path)).mtime_ns} if has_time else {})


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing in which two requests differ, as a phrase; None if they agree."""
    found = _differing(before, now)
    if found is None:
        return None
    (key, *path), old, new = found
    if key == "source" and path:
        return _source_difference(path, old, new, before[key], now[key])
    if key == "options" and path:
        option = _OPTIONS.get(path[0], f"--{path[0].replace('_', '-')}")
        if path[1:]:
            return f"{option} was another: its {quoted(path[1])} differs"
        return f"{_given(option, old)} then, {_given(option, new)} now"
    return f"{key} was {_phrase(old)}, is now {_phrase(new)}"


_OPTIONS = {"max_shard_bytes": "--max-shard-size"}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, ...], Any, Any] | None:
    """The keys that lead to the first value that differs, and both values; what is not there is None."""
    for key in (*now, *(key for key in before if key not in now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if found := _differing(old, new):
                return (key, *found[0]), *found[1:]
        elif old != new:
            return (key,), old, new
    return None


def _source_difference(path: list[str], old: Any, new: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, is_now = _place(before), _place(now)
    if was != is_now:
        return f"the source was {was}, is now {is_now}"
    if path[0] != "files" or len(path) == 1:
        return "the source has another config.json now"
    file = f"the source's file {quoted(path[1])}"
    if old is None or new is None:
        return f"{file} {'was not there then' if old is None else 'is not there any more'}"
    if path[2:] == ["n_bytes"]:
        return f"{file} had {_phrase(old)} bytes, has now {_phrase(new)}"
    if path[2:] == ["mtime_ns"]:
        return f"{file} was changed since, by its time of change"
    return f"{file} holds other tensors now"


def _given(option: str, value: Any) -> str:
    """An option as on the command line, by the value that it led to."""
    if value is None or value is False or value == []:
        return f"no {option}"
    if isinstance(value, dict):  # of an adapter's files
        return f"{option} of another one"
    if value is True:
        return option
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{option} {shlex.quote(str(each))}" for each in values)[:200]


def _place(source: Mapping[str, Any]) -> str:
    """Of a described source."""
    if not isinstance(source.get("commit"), str):
        return "a directory"
    return f"{quoted(str(source.get('repository')))} at {quoted(source['commit'][:12])}"


def _phrase(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):  # of an adapter's files
        return "another one"
    return "not given" if value is None else json.dumps(value)[:80]
