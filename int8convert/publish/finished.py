"""What may be published: a conversion of ours that is finished, whole on the disk, and verified."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_config, read_json_object
from int8convert.checkpoint.layout import CONFIG_NAME, OWN_FOLDER, VERIFY_FILE, quoted
from int8convert.checkpoint.manifest import NOT_PUBLISHED, Manifest, ShardRecord
from int8convert.errors import CorruptFileError, OutputError, SourceError, UnverifiedError

_NOT_PUBLISHED = (*NOT_PUBLISHED, "incoming", "lock")
"""Of our own folder: what only this machine, or a conversion that goes on, needs."""

_MAX_FAILURES = 3

NEVER_VERIFIED = "it was not verified"


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """A finished conversion.

    Attributes:
        config, manifest: the parsed files.
        records: of its shards.
        verify: the parsed verify.json; None if there is none that is about these bytes and passed.
        unverified: why not, as a phrase; "" if there is.
        is_damaged: its weight files were not those of the manifest when it was verified.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    records: tuple[ShardRecord, ...] = field(repr=False)
    verify: dict[str, Any] | None = field(repr=False)
    unverified: str
    is_damaged: bool = False

    @property
    def request(self) -> dict[str, Any]:
        """What was asked of the conversion."""
        found = self.manifest.get("conversion")
        return found if isinstance(found, dict) else {}

    def files(self) -> dict[str, Path]:
        """Name in the repository -> path of all that is published, but for the model card."""
        paths = (path for path in sorted(self.path.rglob("*")) if path.is_file())
        named = {path.relative_to(self.path).as_posix(): path for path in paths}
        return {name: path for name, path in named.items() if _is_published(name)}


def _is_published(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or name.endswith(".incomplete"):
        return False
    return not (parts[0] == OWN_FOLDER and parts[1] in _NOT_PUBLISHED)


def read_finished(out: str | os.PathLike[str]) -> FinishedOutput:
    """Look at an output, and see that it is finished and its shards have their sizes.

    Raises:
        OutputError: it is no finished conversion of ours.
        CorruptFileError: a shard is not there, or of another size.
    """
    path = Path(out)
    manifest = Manifest(path)
    shown = quoted(os.fspath(out), 200)
    if not manifest.is_complete or not (path / CONFIG_NAME).is_file():
        is_begun = manifest.read_request() is not None
        raise OutputError(
            f"{shown} is {'an unfinished conversion' if is_begun else 'no output of int8convert quantize'}",
            f"{'run the same quantize again to finish it' if is_begun else 'name one'}; nothing was sent",
        )
    records = tuple(manifest.read_records().values())
    for record in records:
        shard = path / record.file_name
        n_bytes = shard.stat().st_size if shard.is_file() else None
        if n_bytes != record.n_bytes:
            found = "no such file" if n_bytes is None else f"{n_bytes:,} bytes"
            raise CorruptFileError(
                f"{quoted(record.file_name)} in {shown}: expected {record.n_bytes:,} bytes, found {found}",
                "run the same quantize again, which makes what is missing; nothing was sent",
            )
    verify, unverified, is_damaged = _read_verify(path, {record.file_name: record.sha256 for record in records})
    whole = read_json_object(path / OWN_FOLDER / "manifest.json")
    return FinishedOutput(path, read_config(path / CONFIG_NAME), whole, records, verify, unverified, is_damaged)


def read_published(out: Path) -> FinishedOutput:
    """As `read_finished`, of an output whose shards are not here any longer, and which was not verified."""
    manifest = Manifest(out)
    records = tuple(manifest.read_records().values())
    whole = read_json_object(out / OWN_FOLDER / "manifest.json")
    return FinishedOutput(out, read_config(out / CONFIG_NAME), whole, records, None, NEVER_VERIFIED)


def _read_verify(path: Path, shards: Mapping[str, str]) -> tuple[dict[str, Any] | None, str, bool]:
    """Three attributes of `FinishedOutput`: verify, unverified, is_damaged.

    Args:
        shards: weight file -> sha256, as the manifest has it; `check_shards` compares the files with that.
    """
    file = path / VERIFY_FILE
    if not file.is_file():
        return None, NEVER_VERIFIED, False
    try:
        report = read_json_object(file)
    except (CorruptFileError, SourceError):
        return None, "its verify.json cannot be read", False
    if report.get("is_passed") is not True:
        found = report.get("failures")
        lines = [quoted(line, 300)[1:-1] for line in found if isinstance(line, str)] if isinstance(found, list) else []
        what = f": {'; '.join(lines[:_MAX_FAILURES])}" if lines else ""
        return None, f"it did not pass when it was verified{what}", any(line.startswith("files: ") for line in lines)
    described = report.get("files")
    described = described if isinstance(described, dict) else {}
    names = {*described, CONFIG_NAME, f"{OWN_FOLDER}/manifest.json"}
    outliers = f"{OWN_FOLDER}/outliers.safetensors"
    names |= {outliers} if (path / outliers).is_file() else set()
    for name in sorted(names):
        there = path / name
        found = shards.get(name) or (file_sha256(there) if there.is_file() else "")
        if not found or found != described.get(name):
            return None, f"{quoted(name)} is not the one that was verified", False
    return report, "", False


def check_verified(output: FinishedOutput) -> None:
    """Refuse an output that nothing has shown to be good.

    Raises:
        UnverifiedError: see `FinishedOutput.unverified`.
    """
    if not output.unverified:
        return
    hint = f"run int8convert verify {output.path}, or pass --allow-unverified, which the model card will tell"
    if output.is_damaged:  # which `check_shards` would refuse all the same
        hint = f"remove what is named, run the same quantize again, and int8convert verify {output.path}"
    raise UnverifiedError(
        f"{quoted(str(output.path), 200)} is not to be published: {output.unverified}",
        f"{hint}; nothing was sent",
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
                "remove it, and run the same quantize again, which makes it anew; nothing was sent",
            )
