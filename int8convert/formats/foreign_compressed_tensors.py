"""Which entries another tool's compressed-tensors block may have and still mean the arithmetic of ours.

They are those of our own block, and those that llm-compressor writes for the same arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.formats.format import Difference, Format

_FORMATS = ("int-quantized", "naive-quantized")
_BLOCK: dict[str, Any] = {
    **{"quant_method": (str(Format.COMPRESSED_TENSORS),), "format": _FORMATS, "quantization_status": ("compressed",)},
    **{"config_groups": None, "ignore": None, "global_compression_ratio": None, "version": None},
    **{"kv_cache_scheme": (None,), "moe_sparsity_config": (None,), "transform_config": (None, {})},
    **{"sparsity_config": (None, {}), "run_compressed": (None, True, False)},
}
"""Entries of a block -> their values, see `_not_allowed`. The names in `ignore` are compared elsewhere."""

_GROUP: dict[str, Any] = {
    **{"targets": (["Linear"],), "weights": None, "input_activations": None, "output_activations": (None,)},
    "format": (None, *_FORMATS),
}
_EIGHT_BITS: dict[str, Any] = {
    **{"num_bits": (8,), "type": ("int",), "symmetric": (True,), "observer": None, "observer_kwargs": None},
    **{"group_size": (None,), "block_structure": (None,), "actorder": (None, False)},
    **{"scale_dtype": None, "zp_dtype": None},
}
_WEIGHTS = {**_EIGHT_BITS, "strategy": ("channel",), "dynamic": (None, False)}
_INPUTS = {**_EIGHT_BITS, "strategy": ("token",), "dynamic": (True,)}


def foreign_entries(block: Mapping[str, Any]) -> Iterator[Difference]:
    path = "quantization_config"
    if block.get("llm_int8_has_fp16_weight"):
        yield f"{path}.llm_int8_has_fp16_weight", "False", "another"
    yield from _not_allowed(path, block, _BLOCK)
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        yield f"{path}.config_groups", "one group", f"{len(groups) if isinstance(groups, dict) else 'no'} groups"
        return
    path += ".config_groups.*"
    group = next(iter(groups.values()))
    if not isinstance(group, dict):
        yield path, "an object", type(group).__name__
        return
    yield from _not_allowed(path, group, _GROUP)
    for name, wanted in (("weights", _WEIGHTS), ("input_activations", _INPUTS)):
        if isinstance(group.get(name), dict):
            yield from _not_allowed(f"{path}.{name}", group[name], wanted)
        else:
            yield f"{path}.{name}", "an object", _shown(group, name)


def _not_allowed(path: str, entries: Mapping[str, Any], allowed: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield entries of unknown names, and those whose value is not allowed.

    Args:
        allowed: entry -> the values that it may have, None for any; a value of None stands for a missing entry.
    """
    for key in sorted(entries.keys() | allowed.keys()):
        values = allowed.get(key, (None,))
        if values is not None and not any(_is_same(entries.get(key), value) for value in values):
            expected = " or ".join(json.dumps(value) for value in values)
            yield f"{path}.{key[:60]}", expected if values != (None,) else "no such entry", _shown(entries, key)


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _shown(entries: Mapping[str, Any], key: str) -> str:
    return json.dumps(entries[key])[:80] if key in entries else "no such entry"
