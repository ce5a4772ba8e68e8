"""What may differ in config.json of checkpoints that other tools wrote, of which no manifest tells how they came about.

transformers writes config.json from the loaded model when it saves: the entries below, beside those of the source.
Everything else must be the source's. `exact_foreign_files` is the same for the files beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Difference = tuple[str, str, str]
"""The name of an entry, what was expected, what was found."""

WRITTEN_BY_OTHERS = frozenset(
    {"quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
)
"""Entries, at any depth, that saving a model writes from how it was loaded. None of them changes what is computed from
int8 weights: what was kept may be in another float dtype, and that is compared tensor by tensor."""

_DTYPES = ("float16", "bfloat16", "float32")


def foreign_block(block: Mapping[str, Any]) -> Iterator[Difference]:
    """Entries of quantization_config that would have a loader read the weights in another way."""
    if block.get("llm_int8_has_fp16_weight"):
        yield "quantization_config.llm_int8_has_fp16_weight", "False", "another"
    groups = block.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        if any(not isinstance(target, str) or target.startswith("re:") for target in targets or ()):
            yield f"quantization_config.config_groups.{name}", "plain names as targets", "an expression"


def foreign_entries(found: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Difference]:
    """Entries that differ from the source's, but for `WRITTEN_BY_OTHERS`."""
    dtype = found.get("dtype") or found.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield "dtype", f"one of {', '.join(_DTYPES)}", str(dtype)[:40]
    one, other = _comparable(found), _comparable(source)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key, ...) != other.get(key, ...):
            yield key, _shown(other.get(key)), _shown(one.get(key))


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """Entry -> its JSON, without the entries that saving writes."""
    return {key: json.dumps(_without(value), sort_keys=True) for key, value in _without(config).items()}


def _without(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without(entry) for key, entry in value.items() if key not in WRITTEN_BY_OTHERS}


def _shown(value: str | None) -> str:
    return "no such entry" if value is None else value[:80]
