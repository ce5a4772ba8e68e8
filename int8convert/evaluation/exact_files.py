"""Everything of an int8 checkpoint that is no tensor: its files by their sha256, config.json, what was carried over."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterable, Iterator, Set
from typing import Any

from int8convert.checkpoint.hashing import CHUNK_BYTES, file_sha256
from int8convert.checkpoint.int8_config import Int8Format, read_format, read_skipped_names
from int8convert.checkpoint.layout import quoted
from int8convert.checkpoint.manifest import Manifest, ShardRecord
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.conversion.quantize import DEFAULT_THRESHOLD
from int8convert.evaluation.checks import Check, Finding, make_check
from int8convert.evaluation.exact_layout import is_left_alone
from int8convert.evaluation.provenance import Provenance

_WRITTEN_KEYS = frozenset({"quantization_config", "dtype", "torch_dtype"})
"""What a conversion writes into config.json; all else is the source's."""

_LIST_KEYS = ("llm_int8_skip_modules", "ignore", "modules_to_not_convert")
_BY_PARTS = (Int8Format.BITSANDBYTES, Int8Format.TORCHAO)
"""Formats whose loaders read a name in their list as a beginning or an end of others, too."""


def read_records(out: CheckpointSource) -> dict[str, ShardRecord]:
    """What the manifest says of each weight file; empty where there is no manifest."""
    manifest = Manifest(out.directory)
    return manifest.read_records() if manifest.is_complete else {}


def check_files(
    out: CheckpointSource, weight_files: Set[str], records: dict[str, ShardRecord], is_known: bool
) -> Iterator[Finding]:
    """Weight files the manifest does not name, names and is not there, or that have another size.

    Args:
        weight_files: that are there, whether the index names them or not.
        is_known: there is a manifest, and it should name them all.
    """
    shards = {shard.path.name: shard for shard in out.shards}
    for name in records:
        if name not in shards:
            found = "not named by the index" if name in weight_files else "no such file"
            yield Finding(name, "a weight file", found)
    for name, shard in shards.items():
        record = records.get(name)
        if record is None and (records or is_known):
            yield Finding(name, "no such file: the manifest does not name it", f"{shard.n_bytes:,} bytes")
        elif record is not None and record.n_bytes != shard.n_bytes:
            yield Finding(name, f"{record.n_bytes:,} bytes", f"{shard.n_bytes:,} bytes")
    for name in sorted(weight_files - shards.keys() - records.keys()):
        yield Finding(name, "no weight file beside those of the checkpoint", "one that a loader may take")


def check_sha256(shard: SourceShard, record: ShardRecord) -> Finding | None:
    """Compare a file with its record: what is read of it here, or what the Hub says that it is."""
    if shard.n_bytes != record.n_bytes:
        return None  # found by its size, and cheaper
    found = (
        file_sha256(shard.path, shard.identity)
        if shard.remote is None
        else shard.remote.sha256 or _remote_sha256(shard)
    )
    if found == record.sha256:
        return None
    return Finding(shard.path.name, f"sha256 {quoted(record.sha256)[1:-1]}", f"sha256 {found}")


def _remote_sha256(shard: SourceShard) -> str:
    """Of a file outside of LFS, which the Hub knows by another hash."""
    digest, buffer, reader = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES)), shard.open()
    for begin in range(0, shard.n_bytes, CHUNK_BYTES):
        part = buffer[: shard.n_bytes - begin]
        reader.read_into(part, begin)
        digest.update(part)
    reader.close()
    return digest.hexdigest()


def check_config(
    out: CheckpointSource,
    source: CheckpointSource,
    provenance: Provenance,
    int8_modules: Iterable[str],
    skip_modules: Iterable[str],
) -> Check:
    """config.json: the threshold, the list of modules to leave alone, and the source's own entries.

    Args:
        int8_modules: those the checkpoint holds as int8.
        skip_modules: those a loader must leave alone, by the plan.
    """
    findings = [*_threshold(out, provenance), *_skip_list(out, provenance, int8_modules, skip_modules)]
    if provenance.is_known:
        findings += _other_entries(out.config, source.config)
    return make_check("config", 1, findings)


def _threshold(out: CheckpointSource, provenance: Provenance) -> Iterator[Finding]:
    if read_format(out.config) is not Int8Format.BITSANDBYTES:
        return  # the others have none
    found = out.config["quantization_config"].get("llm_int8_threshold")
    if found is None and not provenance.is_known:
        return
    if type(found) is not float or not found >= 0:
        yield _entry("llm_int8_threshold", "a number with a decimal point, not negative", _shown(found))
        return
    # An export from a format that has no threshold writes the usual one.
    wanted = [provenance.threshold, *([DEFAULT_THRESHOLD] if provenance.is_exported else [])]
    if provenance.threshold is not None and found not in wanted:
        yield _entry("llm_int8_threshold", f"{provenance.threshold:g}", f"{found:g}")


def _skip_list(
    out: CheckpointSource, provenance: Provenance, int8_modules: Iterable[str], skip_modules: Iterable[str]
) -> Iterator[Finding]:
    """No int8 module is to be left alone by the loader, and each other one is: either way it would load garbage."""
    found = read_format(out.config)
    if not any(isinstance(out.config["quantization_config"].get(key), list) for key in _LIST_KEYS):
        # Loaders then go by the model's class, as whoever wrote the checkpoint did.
        if provenance.is_known:
            yield _entry("quantization_config", "a list of the modules to leave alone", "no such list")
        return
    listed = set(read_skipped_names(out.config, found))
    is_by_parts = found in _BY_PARTS
    for module in sorted(int8_modules):
        if module in listed or (is_by_parts and is_left_alone(module, listed)):
            yield _entry("quantization_config", f"{module} to be loaded as int8", "it is among those to leave alone")
            return
    lacking = sorted(set(skip_modules) - listed) if provenance.is_known else []
    if lacking:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        yield _entry("quantization_config", f"{lacking[0]} among the modules to leave alone", f"it is not{more}")


def _other_entries(found: dict[str, Any], source: dict[str, Any]) -> Iterator[Finding]:
    for key in sorted((found.keys() | source.keys()) - _WRITTEN_KEYS):
        if found.get(key, ...) != source.get(key, ...) and not (_is_nan(found.get(key)) and _is_nan(source.get(key))):
            yield _entry(key, _shown(source.get(key)), _shown(found.get(key)))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def _entry(key: str, expected: str, found: str) -> Finding:
    return Finding(f"config.json: {quoted(key)[1:-1]}", expected, found)


def _shown(value: Any) -> str:
    return quoted(str(value), 80) if value is not None else "no such entry"


def check_carried(out: CheckpointSource, source: CheckpointSource, provenance: Provenance) -> Check:
    """Tokenizer, templates and other files are the source's, byte for byte; where a manifest says they were copied."""
    findings = []
    carried = source.carried if provenance.is_known else ()
    for path in carried:
        name = str(path.relative_to(source.directory))
        copy = out.directory / name
        if not copy.is_file():
            findings.append(Finding(name, "a copy of the source's", "no such file"))
        elif not filecmp.cmp(path, copy, shallow=False):
            findings.append(Finding(name, "the source's content", "another"))
    return make_check("carried", len(carried), findings)
