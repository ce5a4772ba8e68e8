"""What identifies a conversion's source, and in which respect two conversions differ.

A rerun continues a conversion only if its request equals the recorded one; otherwise the error names the difference.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from int8convert.checkpoint.file_reader import FileIdentity
from int8convert.checkpoint.hashing import json_sha256
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.text import quoted

_OPTIONS = {"max_shard_bytes": "--max-shard-size", "keep_text": "--text"}
"""Recorded options whose flag has another name."""


def describe_source(source: CheckpointSource) -> dict[str, Any]:
    """Return what identifies the bytes of a source without reading them: sizes, times of change, headers and config.

    A repository on the Hub is identified by its commit in place of times.
    """
    described = {
        "config_sha256": json_sha256(source.config),
        "files": {shard.path.name: _describe_shard(shard, source.commit is None) for shard in source.shards},
    }
    return {"repository": source.label, "commit": source.commit, **described} if source.commit else described


def _describe_shard(shard: SourceShard, has_time: bool) -> dict[str, Any]:
    header = [[t.name, t.dtype, t.shape, t.offset, t.strides] for t in shard.tensors]
    described = {"n_bytes": shard.n_bytes, "header_sha256": json_sha256(header)}
    return described | ({"mtime_ns": (shard.identity or FileIdentity.of(shard.path)).mtime_ns} if has_time else {})


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first difference of two requests as a phrase; None if they agree."""
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


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, ...], Any, Any] | None:
    """Return the keys that lead to the first differing value, and both values; a missing one is None."""
    for key in (*before, *(key for key in now if key not in before)):
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
    """Return an option as the command line has it, from its recorded value."""
    if value is None or value is False or value == []:
        return f"no {option}"
    if isinstance(value, dict):  # the hashes of an adapter's files
        return f"{option} of another one"
    if value is True:
        return option
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{option} {shlex.quote(str(each))}" for each in values)[:200]


def _place(source: Mapping[str, Any]) -> str:
    """Return where a described source is."""
    if not isinstance(source.get("commit"), str):
        return "a directory"
    return f"{quoted(str(source.get('repository')))} at {quoted(source['commit'][:12])}"


def _phrase(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):  # the hashes of an adapter's files
        return "another one"
    return "not given" if value is None else json.dumps(value)[:80]
