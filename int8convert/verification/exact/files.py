"""Compares the files of an int8 checkpoint with the manifest and the source, and finds files that do not belong there.

Loaders take what is in a directory: a template, a token map, code, an adapter, a pickle. So a file that the source
lacks and the conversion does not write is a finding, whatever its name. Files that no loader reads are exempt.
The plan says what the source lacks (`model_map.ModelNeeds`), and the check of tensors (`layout`) that the checkpoint
has all the rest. Together they cover every parameter of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from int8convert.checkpoint.hashing import CHUNK_BYTES, file_sha256
from int8convert.checkpoint.json_file import MAX_INDEX_BYTES, read_json_object
from int8convert.checkpoint.loaders.files import is_inert
from int8convert.checkpoint.loaders.shard_index import IndexDifferences
from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.names import (
    CARD_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    LOCAL_FILE,
    LOCK_FILE,
    MANIFEST_NAME,
    OUTLIERS_FILE,
    SMOOTHING_FILE,
    VERIFY_FILE,
)
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.errors import CorruptFileError
from int8convert.patterns import is_allowed
from int8convert.planning.model_map.model_map import ModelMap
from int8convert.planning.needs import made_up
from int8convert.text import quoted
from int8convert.verification.checks import Check, Finding, make_check
from int8convert.verification.exact.foreign_files import check_foreign_files, is_saved_by_others
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.opened import ExaminedCheckpoint

_OWN = (MANIFEST_NAME, VERIFY_FILE, OUTLIERS_FILE, LOCAL_FILE, LOCK_FILE)
_NOT_VOUCHED_FOR = frozenset({VERIFY_FILE, LOCAL_FILE, LOCK_FILE, CARD_NAME})
"""Files that are written after the comparison, or are not published."""


def read_records(out: CheckpointSource) -> dict[str, ShardRecord]:
    """Return the manifest's record of each weight file; {} if no manifest can be read."""
    manifest = Manifest(out.directory)
    try:
        return manifest.read_finished_records() if manifest.is_complete else {}
    except CorruptFileError:
        return {}  # `Provenance.problem` says so


def check_files(
    examined: ExaminedCheckpoint, records: Mapping[str, ShardRecord], provenance: Provenance
) -> Iterator[Finding]:
    """Find weight files that are missing, unknown to the manifest or of another size, and errors in the index."""
    if provenance.problem:
        yield Finding(MANIFEST_NAME, "a manifest of this version of int8convert", provenance.problem)
    if provenance.factors and (found := file_sha256(provenance.factors)) != provenance.factors_sha256:
        yield Finding(SMOOTHING_FILE, f"sha256 {quoted(provenance.factors_sha256)[1:-1]}", f"sha256 {found}")
    shards = {shard.path.name: shard for shard in examined.source.shards}
    for name in records:
        if name not in shards:
            found = "not named by the index" if name in examined.weight_files else "no such file"
            yield Finding(name, "a weight file", found)
    for name, shard in shards.items():
        record = records.get(name)
        if record is None and (records or provenance.is_known):
            yield Finding(name, "no such file: the manifest does not name it", f"{shard.n_bytes:,} bytes")
        elif record is not None and record.n_bytes != shard.n_bytes:
            yield Finding(name, f"{record.n_bytes:,} bytes", f"{shard.n_bytes:,} bytes")
    for name in sorted(examined.weight_files - shards.keys() - records.keys()):
        yield Finding(name, "no weight file beside those of the checkpoint", "one that a loader may take")
    yield from _check_index(examined.source)


def _check_index(out: CheckpointSource) -> Iterator[Finding]:
    """Find tensors that the index lacks, and entries that no index has. `needs` finds tensors that it misplaces."""
    path = out.directory / INDEX_NAME
    if not has_index(out) or not path.is_file():
        return
    index = read_json_object(path, MAX_INDEX_BYTES)
    for key in sorted(index.keys() - {"metadata", "weight_map"}):
        yield Finding(f"{INDEX_NAME}: {quoted(key)[1:-1]}", "no such entry", "one")
    for shard in out.shards:
        lacking = [tensor.name for tensor in shard.tensors if tensor.name not in index["weight_map"]]
        for name in lacking[:1]:
            more = f", and {len(lacking) - 1:,} more are missing" if len(lacking) > 1 else ""
            yield Finding(f"{INDEX_NAME}: {quoted(name)[1:-1]}", shard.path.name, f"no such entry{more}")


def has_index(out: CheckpointSource) -> bool:
    """Return whether a checkpoint has an index: a single file of the usual name needs none."""
    return [shard.path.name for shard in out.shards] != ["model.safetensors"]


def hash_shard(shard: SourceShard) -> str:
    """Return the sha256 of a weight file: of its bytes, or as the Hub lists it."""
    return (
        file_sha256(shard.path, shard.identity)
        if shard.remote is None
        else shard.remote.sha256 or _remote_sha256(shard)
    )


def compare_sha256(shard: SourceShard, sha256: str, record: ShardRecord | None) -> Finding | None:
    """Compare a file with its record. A file of another size is a finding already."""
    if record is None or shard.n_bytes != record.n_bytes or sha256 == record.sha256:
        return None
    return Finding(shard.path.name, f"sha256 {quoted(record.sha256)[1:-1]}", f"sha256 {sha256}")


def _remote_sha256(shard: SourceShard) -> str:
    """Hash a remote file outside of LFS, for which the Hub lists another hash."""
    digest, buffer, reader = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES)), shard.open()
    for begin in range(0, shard.n_bytes, CHUNK_BYTES):
        part = buffer[: shard.n_bytes - begin]
        reader.read_into(part, begin)
        digest.update(part)
    reader.close()
    return digest.hexdigest()


def check_auxiliary(examined: ExaminedCheckpoint, source: CheckpointSource, provenance: Provenance) -> Check:
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
    auxiliary = {path.relative_to(source.directory).as_posix() for path in source.auxiliary_files}
    expected = {CONFIG_NAME, *_OWN, *auxiliary, *examined.weight_files}
    expected |= {INDEX_NAME} if has_index(examined.source) else set()
    expected |= {SMOOTHING_FILE} if provenance.factors else set()
    for name in sorted(examined.names - expected):
        if is_inert(name) or (not provenance.is_known and is_saved_by_others(name, auxiliary)):
            continue
        yield Finding(name, "no such file: the source lacks it, and the conversion does not write it", "one")


def hash_beside(examined: ExaminedCheckpoint, source: CheckpointSource) -> dict[str, str]:
    """Return the sha256 of the auxiliary files that were compared.

    Files that are written afterwards are left out, and files that no loader reads and the source lacks: notes,
    pictures, pages of `verify --report`.
    """
    auxiliary = {path.relative_to(source.directory).as_posix() for path in source.auxiliary_files}
    names = {name for name in examined.names - examined.weight_files if name in auxiliary or not is_inert(name)}
    paths = {name: examined.path_of(name) for name in names - _NOT_VOUCHED_FOR}
    return {name: file_sha256(path) for name, path in sorted(paths.items()) if isinstance(path, Path)}


def check_needs(out: CheckpointSource, model_map: ModelMap, provenance: Provenance) -> Check:
    """Find weights that loaders would initialize at random, or take from another file than the index says.

    Args:
        model_map: the source's. If name rules made it, the needs of the model are unknown.
    """
    n_tensors = sum(len(shard.tensors) for shard in out.shards)
    return make_check("needs", n_tensors, [*_lacking(model_map, provenance), *_misplaced(out.index)])


def _lacking(model_map: ModelMap, provenance: Provenance) -> Iterator[Finding]:
    needs = model_map.needs
    if needs is None:
        return
    for name in made_up(model_map):
        if not is_allowed(name, provenance.allow_missing):
            expected = f"{list(needs.missing[name])}, which {model_map.model_class} needs"
            yield Finding(name, expected, "no such tensor: loaders initialize it at random")
    for name, (found, has) in needs.mismatched.items():
        given = "tensors that do not fit together" if found is None else str(list(found))
        yield Finding(name, f"{list(has)}, which {model_map.model_class} has", given)
    for name, dtype in needs.integers.items():
        yield Finding(name, f"floats in the source, as {model_map.model_class} has them", dtype)


def _misplaced(index: IndexDifferences) -> Iterator[Finding]:
    for name, file_name in index.absent.items():
        yield Finding(name, f"a tensor in {file_name}, as the index says", "no such tensor")
    for name, (said, found) in index.moved.items():
        yield Finding(name, f"a tensor in {said}, as the index says", f"it in {found}")
    for repeated in index.repeated:
        yield Finding(repeated.name, "a tensor in one file", f"it in {' and '.join(repeated.files)}")


def allowed_note(model_map: ModelMap, provenance: Provenance) -> str | None:
    """Return what the conversion was allowed to leave out, as a sentence; None if nothing."""
    allowed = [name for name in made_up(model_map) if is_allowed(name, provenance.allow_missing)]
    if not allowed:
        return None
    more = f" and {len(allowed) - 1:,} more" if len(allowed) > 1 else ""
    return (
        f"{allowed[0]}{more}, which {model_map.model_class} needs, is in no file: the conversion was allowed this by "
        f"--allow-missing {' '.join(provenance.allow_missing)}"
    )
