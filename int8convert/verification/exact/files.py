"""Compares the weight files of an int8 checkpoint and their index with the manifest: names, sizes, sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from int8convert.checkpoint.hashing import CHUNK_BYTES, file_sha256
from int8convert.checkpoint.json_file import MAX_INDEX_BYTES, read_json_object
from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.names import INDEX_NAME, MANIFEST_NAME
from int8convert.checkpoint.shard_record import ShardRecord
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.errors import CorruptFileError
from int8convert.text import quoted
from int8convert.verification.checks import Finding
from int8convert.verification.exact.provenance import Provenance
from int8convert.verification.opened import ExaminedCheckpoint


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
