"""Checks the auxiliary files of an int8 checkpoint, and finds files that should not be there.

Loaders take what is in a directory: a template, a token map, code, an adapter, a pickle. So a file that the source
lacks and the conversion does not write is a finding, whatever its name. Files that no loader reads are exempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.names import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    LOCAL_FILE,
    LOCK_FILE,
    MANIFEST_NAME,
    OUTLIERS_FILE,
    VERIFY_FILE,
)
from int8convert.checkpoint.source import CheckpointSource
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.files import has_index
from int8convert.verification.exact.foreign_files import check_foreign_files, is_saved_by_others
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.opened import ExaminedCheckpoint

_OWN = (MANIFEST_NAME, VERIFY_FILE, OUTLIERS_FILE, LOCAL_FILE, LOCK_FILE)
_NOT_VOUCHED_FOR = frozenset({VERIFY_FILE, LOCAL_FILE, LOCK_FILE, CARD_NAME})
"""Files that are written after the comparison, or are not published."""


def check_carried(examined: ExaminedCheckpoint, source: CheckpointSource, provenance: Provenance) -> Check:
    """Compare tokenizer, templates and other auxiliary files with the source's.

    Byte by byte if a manifest says that they were copied; `foreign_files` compares files that other tools saved.
    """
    if not provenance.is_known:
        return make_check("carried", *check_foreign_files(examined, source))
    findings = []
    for path in source.auxiliary_files:
        name = path.relative_to(source.directory).as_posix()
        copy = examined.path_of(name)
        if copy is None:
            findings.append(Finding(name, "a copy of the source's", "no such file"))
        elif file_sha256(path) != file_sha256(copy):
            findings.append(Finding(name, "the source's content", "another"))
    return make_check("carried", len(source.auxiliary_files), findings)


def check_beside(examined: ExaminedCheckpoint, source: CheckpointSource, provenance: Provenance) -> Check:
    """Find files that should not be in the checkpoint."""
    findings = [Finding(name, "a file of this checkpoint", why) for name, why in examined.refused.items()]
    findings += _strange(examined, source, provenance)
    return make_check("beside", max(1, len(examined.names)), findings)


def _strange(examined: ExaminedCheckpoint, source: CheckpointSource, provenance: Provenance) -> Iterator[Finding]:
    carried = {path.relative_to(source.directory).as_posix() for path in source.auxiliary_files}
    expected = {CONFIG_NAME, *_OWN, *carried, *examined.weight_files}
    expected |= {INDEX_NAME} if has_index(examined.source) else set()
    for name in sorted(examined.names - expected):
        if is_inert(name) or (not provenance.is_known and is_saved_by_others(name, carried)):
            continue
        yield Finding(name, "no such file: the source lacks it, and the conversion does not write it", "one")


def hash_beside(examined: ExaminedCheckpoint, source: CheckpointSource) -> dict[str, str]:
    """Return the sha256 of the auxiliary files that were compared.

    Files that are written afterwards are left out, and files that no loader reads and the source lacks: notes,
    pictures, pages of `verify --report`.
    """
    carried = {path.relative_to(source.directory).as_posix() for path in source.auxiliary_files}
    names = {name for name in examined.names - examined.weight_files if name in carried or not is_inert(name)}
    paths = {name: examined.path_of(name) for name in names - _NOT_VOUCHED_FOR}
    return {name: file_sha256(path) for name, path in sorted(paths.items()) if isinstance(path, Path)}
