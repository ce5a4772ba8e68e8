"""Decides whether the verify.json of an output vouches for the files that are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_own_hashed_json
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.loaders.present_files import PresentFiles
from int8convert.checkpoint.manifest import NOT_PUBLISHED
from int8convert.checkpoint.names import CARD_NAME, CONFIG_NAME, MANIFEST_NAME, OWN_FOLDER, VERIFY_FILE
from int8convert.errors import CorruptFileError, SourceError
from int8convert.publish.verify_json import read_recorded_report, undecided_on_record
from int8convert.text import quoted

NEVER_VERIFIED = "not verified yet"
_FAILED = "it did not pass when it was verified"
_MAX_FAILURES = 3
_NOT_PUBLISHED = (*NOT_PUBLISHED, "incoming", "lock")
"""Files of our own folder that only this machine, or a running conversion, needs."""


@dataclass(frozen=True, slots=True)
class Vouching:
    """The meaning of verify.json for the files that are there.

    Attributes:
        verify: the parsed file; None unless it is about these bytes and passed.
        unverified: why `verify` is None, as a phrase; "" otherwise.
        is_damaged: when the output was verified, its weight files were not those of the manifest.
        own: the name of verify.json -> its sha256, if it is published.
        vouched: file -> sha256, as verify.json lists them.
    """

    verify: dict[str, Any] | None
    unverified: str
    is_damaged: bool = False
    own: Mapping[str, str] = field(default_factory=dict)
    vouched: Mapping[str, str] = field(default_factory=dict)


def is_private(name: str) -> bool:
    """Return whether a file of our own folder is never published."""
    parts = name.split("/")
    return parts[0] == OWN_FOLDER and len(parts) > 1 and parts[1] in _NOT_PUBLISHED


def read_vouching(present: PresentFiles, shards: Mapping[str, str]) -> Vouching:
    """Read verify.json.

    Args:
        shards: weight file -> sha256, as in the manifest. `check_shards` compares the files with it.
    """
    if VERIFY_FILE not in present.files:
        return Vouching(None, NEVER_VERIFIED)
    try:
        report, sha256 = read_own_hashed_json(present.files[VERIFY_FILE])
    except (CorruptFileError, SourceError):
        return Vouching(None, "its verify.json cannot be read")
    files = report.get("files")
    vouched = files if isinstance(files, dict) else {}
    unverified = _first_unverified(present, vouched, shards)
    own = {VERIFY_FILE: sha256} if not unverified else {}
    if report.get("is_passed") is not True:
        failures = report.get("failures")
        lines = [line for line in failures if isinstance(line, str)] if isinstance(failures, list) else []
        undecided = [each.line for each in undecided_on_record(report)]
        why = "too few tokens were measured to say whether it passes" if undecided else _FAILED
        lines += undecided
        shown = "; ".join(quoted(line, 300)[1:-1] for line in lines[:_MAX_FAILURES])
        unverified = f"{why}{f': {shown}' if lines else ''}"
        is_damaged = any(line.startswith("files: ") for line in lines)
        return Vouching(None, unverified, is_damaged, own if lines else {})
    checked = read_recorded_report(report)
    if not unverified and checked is None:
        return Vouching(None, "its verify.json holds what verify does not write")
    return Vouching(None if unverified else checked, unverified, False, own, vouched)


def _first_unverified(present: PresentFiles, vouched: Mapping[str, Any], shards: Mapping[str, str]) -> str:
    """Return the first file for which verify.json does not vouch as it is now, as a phrase; "" if there is none."""
    for name in sorted({*vouched, *shards, CONFIG_NAME, MANIFEST_NAME}):
        path = present.files.get(name)
        if path is None:
            return f"{quoted(name)} was verified and is gone"
        if (shards.get(name) or file_sha256(path)) != vouched.get(name):
            return f"{quoted(name)} is not the one that was verified"
    for name in present.files.keys() - vouched.keys() - {VERIFY_FILE, CARD_NAME}:
        if not is_inert(name) and not is_private(name):
            return f"{quoted(name)} is not one of the verified files"
    return ""
