"""Reads what may be published: a conversion of ours that is finished, whole on the disk, and verified.

Published are the files that verify.json lists, with the bytes that it lists. An unverified output that is published
all the same consists of the files that the manifest lists, auxiliary files only with the bytes that it lists: the
conversion wrote them, though nothing has compared them since. All other files stay here, or are an error if a loader
might read them. Hashes are fixed before anything is sent; see `Branch.send`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_config, read_own_json
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.loaders.present_files import PresentFiles, find_present
from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.names import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    OUTLIERS_FILE,
    SMOOTHING_FILE,
)
from int8convert.errors import CorruptFileError, OutputError, UnverifiedError
from int8convert.formats.format import Format
from int8convert.planning.recorded_request import read_recorded_request
from int8convert.publish.verify_json import clearing_command
from int8convert.publish.vouched_files import NEVER_VERIFIED, Vouching, is_private, read_vouching
from int8convert.text import quoted

_OF_EVERY_OUTPUT = frozenset({CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, OUTLIERS_FILE, SMOOTHING_FILE})
_RERUN = "run the same quantize again"


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A finished conversion.

    Attributes:
        hashes: name in the repository -> sha256 to publish, without the model card.
        verify: verify.json, parsed; None unless it is about these bytes and passed.
        unverified: why `verify` is None, as a phrase; "" otherwise.
        is_damaged: when the output was verified, its weight files were not those of the manifest.
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
        """The request of the conversion: source, format and options."""
        found = self.manifest.get("conversion")
        return found if isinstance(found, dict) else {}

    @property
    def options(self) -> dict[str, Any]:
        found = self.request.get("options")
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
        """Return name in the repository -> path of all files to publish, without the model card."""
        return {name: path for name, path in self.present.files.items() if name in self.hashes}

    def skipped_files(self) -> tuple[str, ...]:
        """Return the names of files that are not published, without those of our own folder that never are."""
        published = self.files()
        return tuple(
            name for name in self.present.files if name not in published and name != CARD_NAME and not is_private(name)
        )


def read_finished(out: str | os.PathLike[str]) -> FinishedOutput:
    """Read an output, and check that it is finished and its shards have their sizes.

    Raises:
        OutputError: it is no finished conversion of ours to int8, or holds a link out of it, or a pipe.
        CorruptFileError: a shard is missing or has another size; or the manifest is not understood.
    """
    path = Path(out)
    manifest = Manifest(path)
    shown = quoted(os.fspath(out), 200)
    if not manifest.is_complete or not (path / CONFIG_NAME).is_file():
        is_begun = manifest.read_request() is not None
        raise OutputError(
            f"{shown} is {'an unfinished conversion' if is_begun else 'no output of int8convert quantize'}",
            f"{_RERUN} to finish it" if is_begun else "give a finished output of int8convert quantize",
        )
    present = find_present(path)
    for name, why in present.refused.items():
        is_needed = why.startswith("a link") and "folder" not in why and not is_inert(name) and "/" not in name
        hint = "replace the link with a copy of the file" if is_needed else "remove it"
        raise OutputError(f"{quoted(name)} in {shown} is {why}", hint)
    recorded = read_recorded_request(path)
    if recorded is not None and recorded.format not in tuple(Format):
        raise OutputError(
            f"{shown} is no int8 checkpoint, and the model card of an upload is about int8", "send it by `hf upload`"
        )
    output = _read(path, present, is_here=True)
    for record in output.records:
        shard = present.files.get(record.file_name)
        n_bytes = shard.stat().st_size if shard is not None else None
        if n_bytes != record.n_bytes:
            found = "no such file" if n_bytes is None else f"{n_bytes:,} bytes"
            raise CorruptFileError(
                f"{quoted(record.file_name)} in {shown}: expected {record.n_bytes:,} bytes, found {found}",
                f"{_RERUN} to make it",
            )
    return output


def read_published(out: Path) -> FinishedOutput:
    """Read an output whose shards are not here any longer, and which was not verified."""
    return _read(out, find_present(out), is_here=False)


def _read(path: Path, present: PresentFiles, is_here: bool) -> FinishedOutput:
    records = tuple(Manifest(path).read_finished_records().values())
    shards = {record.file_name: record.sha256 for record in records}
    manifest = read_own_json(path / MANIFEST_NAME)
    report = read_vouching(present, shards) if is_here else Vouching(None, NEVER_VERIFIED)
    hashes = report.vouched if report.verify is not None else _as_converted(present, manifest, shards)
    return FinishedOutput(
        path,
        read_config(path / CONFIG_NAME),
        manifest,
        records,
        present,
        {name: sha256 for name, sha256 in {**hashes, **report.own}.items() if name != CARD_NAME},
        report.verify,
        report.unverified,
        report.is_damaged,
    )


def _as_converted(present: PresentFiles, manifest: Mapping[str, Any], shards: Mapping[str, str]) -> dict[str, str]:
    """Return file -> sha256 of the files that are as the conversion wrote them.

    The manifest has no hash of config.json and the other files of every output; they are taken as they are.
    """
    copied = manifest.get("carried")
    expected = copied if isinstance(copied, dict) else {}
    found = {name: file_sha256(present.files[name]) for name in {*expected, *_OF_EVERY_OUTPUT} & present.files.keys()}
    return {**{name: sha256 for name, sha256 in found.items() if expected.get(name, sha256) == sha256}, **shards}


def check_verified(output: FinishedOutput) -> None:
    """Refuse an output that is not verified.

    Raises:
        UnverifiedError: see `FinishedOutput.unverified`.
    """
    if not output.unverified:
        return
    command = clearing_command(output.path)
    hint = f"run `{command}`, or pass --allow-unverified; the model card then says so"
    if output.is_damaged:  # `check_shards` would refuse it even with --allow-unverified
        hint = f"remove what is named, {_RERUN}, then `{command}`"
    raise UnverifiedError(f"{quoted(str(output.path), 200)} cannot be published: {output.unverified}", hint)


def check_shards(output: FinishedOutput) -> None:
    """Compare the sha256 of all shards with the manifest."""
    for record in output.records:
        found = file_sha256(output.path / record.file_name)
        if found != record.sha256:
            raise CorruptFileError(
                f"{quoted(record.file_name)} in {quoted(str(output.path), 200)} has sha256 {found}, "
                f"expected {record.sha256}, as the manifest says",
                f"remove it, and {_RERUN} to make it again",
            )
