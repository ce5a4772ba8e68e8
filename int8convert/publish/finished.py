"""What may be published: a conversion of ours that is finished, whole on the disk, and verified.

Published are the files that verify.json vouches for, in the very bytes that it names. Of an output that is not
verified, and is to be published all the same, it is those that the manifest names, carried files only in the bytes
that it names: the conversion wrote them, though nobody has compared them since. Whatever else lies there stays there,
or is an error if a loader might take it. The hashes are fixed before anything is sent; see `Target.send`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_config, read_own_hashed_json, read_own_json
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.loaders.present_files import PresentFiles, find_present
from int8convert.checkpoint.manifest import NOT_PUBLISHED, Manifest, ShardRecord
from int8convert.checkpoint.names import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    OUTLIERS_FILE,
    OWN_FOLDER,
    VERIFY_FILE,
)
from int8convert.errors import CorruptFileError, OutputError, SourceError, UnverifiedError
from int8convert.formats.format import Format
from int8convert.planning.recorded_request import read_recorded_request
from int8convert.publish.verify_json import clearing_command, read_recorded_report
from int8convert.text import quoted

_NOT_PUBLISHED = (*NOT_PUBLISHED, "incoming", "lock")
"""Of our own folder: what only this machine, or a conversion that goes on, needs."""

_OF_EVERY_OUTPUT = frozenset({CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, OUTLIERS_FILE})
_MAX_FAILURES = 3

NEVER_VERIFIED = "not verified yet"


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A finished conversion.

    Attributes:
        config, manifest: the parsed files.
        records: of its shards.
        present: the files that lie there.
        hashes: name in the repository -> the sha256 in which a file is published, of all but the model card.
        verify: the parsed verify.json; None if there is none that is about these bytes and passed.
        unverified: why not, as a phrase; "" if there is.
        is_damaged: its weight files were not those of the manifest when it was verified.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    records: tuple[ShardRecord, ...] = field(repr=False)
    present: PresentFiles = field(repr=False)
    hashes: Mapping[str, str] = field(repr=False)
    verify: dict[str, Any] | None = field(repr=False)
    unverified: str
    is_damaged: bool = False

    @property
    def request(self) -> dict[str, Any]:
        """What was asked of the conversion."""
        found = self.manifest.get("conversion")
        return found if isinstance(found, dict) else {}

    @property
    def quant_method(self) -> str:
        """The layout that config.json names; "" if it names none."""
        block = self.config.get("quantization_config")
        return str(block.get("quant_method") or "") if isinstance(block, dict) else ""

    @property
    def format(self) -> Format | None:
        """The int8 format of the checkpoint; None if it has another or none."""
        return Format(self.quant_method) if self.quant_method in tuple(Format) else None

    def files(self) -> dict[str, Path]:
        """Name in the repository -> path of all that is published, but for the model card."""
        return {name: path for name, path in self.present.files.items() if name in self.hashes}

    def left(self) -> tuple[str, ...]:
        """Names of the files that are not published, but for those of our own folder that stay here always."""
        published = self.files()
        return tuple(
            name for name in self.present.files if name not in published and name != CARD_NAME and not _is_private(name)
        )


def _is_private(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == OWN_FOLDER and len(parts) > 1 and parts[1] in _NOT_PUBLISHED


def read_finished(out: str | os.PathLike[str]) -> FinishedOutput:
    """Look at an output, and see that it is finished and its shards have their sizes.

    Raises:
        OutputError: it is no finished conversion of ours, or holds a link out of it, or a pipe.
        CorruptFileError: a shard is not there, or of another size; or the manifest is not understood.
    """
    path = Path(out)
    manifest = Manifest(path)
    shown = quoted(os.fspath(out), 200)
    if not manifest.is_complete or not (path / CONFIG_NAME).is_file():
        is_begun = manifest.read_request() is not None
        raise OutputError(
            f"{shown} is {'an unfinished conversion' if is_begun else 'no output of int8convert quantize'}",
            "run the same quantize again to finish it" if is_begun else "name one",
        )
    present = find_present(path)
    for name, why in present.refused.items():
        is_needed = why.startswith("a link") and "folder" not in why and not is_inert(name) and "/" not in name
        way_out = "replace the link with a copy of the file" if is_needed else "remove it"
        raise OutputError(f"{quoted(name)} in {shown} is {why}", way_out)
    read_recorded_request(path)
    records = tuple(manifest.read_finished_records().values())
    for record in records:
        shard = present.files.get(record.file_name)
        n_bytes = shard.stat().st_size if shard is not None else None
        if n_bytes != record.n_bytes:
            found = "no such file" if n_bytes is None else f"{n_bytes:,} bytes"
            raise CorruptFileError(
                f"{quoted(record.file_name)} in {shown}: expected {record.n_bytes:,} bytes, found {found}",
                "run the same quantize again, which makes what is missing",
            )
    shards = {record.file_name: record.sha256 for record in records}
    recorded = _read_verify(present, shards)
    whole = read_own_json(path / MANIFEST_NAME)
    config = read_config(path / CONFIG_NAME)
    hashes = recorded.vouched if recorded.verify is not None else _as_converted(present, whole, shards)
    hashes = {name: sha256 for name, sha256 in {**hashes, **recorded.own}.items() if name != CARD_NAME}
    return FinishedOutput(
        path, config, whole, records, present, hashes, recorded.verify, recorded.unverified, recorded.is_damaged
    )


def read_published(out: Path) -> FinishedOutput:
    """As `read_finished`, of an output whose shards are not here any longer, and which was not verified."""
    manifest = Manifest(out)
    records = tuple(manifest.read_finished_records().values())
    whole = read_own_json(out / MANIFEST_NAME)
    config = read_config(out / CONFIG_NAME)
    present = find_present(out)
    hashes = _as_converted(present, whole, {record.file_name: record.sha256 for record in records})
    return FinishedOutput(out, config, whole, records, present, hashes, None, NEVER_VERIFIED)


def _as_converted(present: PresentFiles, manifest: Mapping[str, Any], shards: Mapping[str, str]) -> dict[str, str]:
    """The files that are as the conversion wrote them, by its manifest -> their sha256.

    Of config.json and the other files that each output has, the manifest holds no hash: they are as they are now.
    """
    told = manifest.get("carried")
    carried = told if isinstance(told, dict) else {}
    now = {name: file_sha256(present.files[name]) for name in {*carried, *_OF_EVERY_OUTPUT} & present.files.keys()}
    return {**{name: found for name, found in now.items() if carried.get(name, found) == found}, **shards}


@dataclass(frozen=True, slots=True)
class _RecordedReport:
    """What verify.json means for the files that are there: attributes of `FinishedOutput`, and

    Attributes:
        own: its name -> its sha256, as it was read, if it is about these bytes; else it is not published.
        vouched: file -> sha256, as it says.
    """

    verify: dict[str, Any] | None
    unverified: str
    is_damaged: bool = False
    own: Mapping[str, str] = field(default_factory=dict)
    vouched: Mapping[str, str] = field(default_factory=dict)


def _read_verify(present: PresentFiles, shards: Mapping[str, str]) -> _RecordedReport:
    """Read verify.json, once.

    Args:
        shards: weight file -> sha256, as the manifest has it; `check_shards` compares the files with that.
    """
    if VERIFY_FILE not in present.files:
        return _RecordedReport(None, NEVER_VERIFIED)
    try:
        report, sha256 = read_own_hashed_json(present.files[VERIFY_FILE])
    except (CorruptFileError, SourceError):
        return _RecordedReport(None, "its verify.json cannot be read")
    told = report.get("files")
    vouched = told if isinstance(told, dict) else {}
    unverified = _first_unverified(present, vouched, shards)
    own = {VERIFY_FILE: sha256} if not unverified else {}
    if report.get("is_passed") is not True:
        found = report.get("failures")
        lines = [quoted(line, 300)[1:-1] for line in found if isinstance(line, str)] if isinstance(found, list) else []
        what = f": {'; '.join(lines[:_MAX_FAILURES])}" if lines else ""
        is_damaged = any(line.startswith("files: ") for line in lines)
        return _RecordedReport(None, f"it did not pass when it was verified{what}", is_damaged, own if lines else {})
    whole = read_recorded_report(report)
    if not unverified and whole is None:
        return _RecordedReport(None, "its verify.json holds what verify does not write")
    return _RecordedReport(None if unverified else whole, unverified, False, own, vouched)


def _first_unverified(present: PresentFiles, vouched: Mapping[str, Any], shards: Mapping[str, str]) -> str:
    """The first file that verify.json does not vouch for as it is now, as a phrase; "" if there is none."""
    for name in sorted({*vouched, *shards, CONFIG_NAME, MANIFEST_NAME}):
        path = present.files.get(name)
        if path is None:
            return f"{quoted(name)} was verified and is gone"
        if (shards.get(name) or file_sha256(path)) != vouched.get(name):
            return f"{quoted(name)} is not the one that was verified"
    for name in present.files.keys() - vouched.keys() - {VERIFY_FILE, CARD_NAME}:
        if not is_inert(name) and not _is_private(name):
            return f"{quoted(name)} is none of the files that were verified"
    return ""


def check_verified(output: FinishedOutput) -> None:
    """Refuse an output that nothing has shown to be good.

    Raises:
        UnverifiedError: see `FinishedOutput.unverified`.
    """
    if not output.unverified:
        return
    command = clearing_command(output.path)
    hint = f"run `{command}`, or pass --allow-unverified; the model card then says so"
    if output.is_damaged:  # which `check_shards` would refuse all the same
        hint = f"remove what is named, run the same quantize again, then `{command}`"
    raise UnverifiedError(
        f"{quoted(str(output.path), 200)} cannot be published: {output.unverified}",
        f"{hint}",
    )


def check_shards(output: FinishedOutput) -> None:
    """Read all shards, and see that they are what the manifest says.

    Raises:
        CorruptFileError: one is not.
    """
    for record in output.records:
        found = file_sha256(output.path / record.file_name)
        if found != record.sha256:
            raise CorruptFileError(
                f"{quoted(record.file_name)} in {quoted(str(output.path), 200)} has sha256 {found}, "
                f"expected {record.sha256}, as the manifest says",
                "remove it, and run the same quantize again, which makes it anew",
            )
