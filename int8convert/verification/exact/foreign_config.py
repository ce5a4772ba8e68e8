"""What may differ in config.json of checkpoints that other tools wrote, without a manifest.

transformers writes config.json from the loaded model when it saves: the entries below, beside those of the source, and
these in the form of its own version. So where two configs differ, they are compared as the model's class reads them.
Everything else must be the source's. `exact_foreign_files` is the same for the files beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.verification.exact.as_loaded import as_loaded

Difference = tuple[str, str, str]
"""The name of an entry, what was expected, what was found."""

WRITTEN_BY_OTHERS = frozenset(
    {"quantization_config", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
)
"""Entries, at any depth, that saving a model writes from how it was loaded. None of them changes what is computed from
int8 weights: what was kept may be in another float dtype, and that is compared tensor by tensor."""

_SENDS_ELSEWHERE = frozenset({"auto_map", "configuration_files", "transformers_weights", "custom_pipelines"})
"""Entries by which a loader takes code or files; no class of transformers reads them."""

_MOST_ADDED = 200
"""Entries beside the source's that count only if the model's class reads them."""

_DTYPES = ("float16", "bfloat16", "float32")


_FORMATS = ("int-quantized", "naive-quantized")
_BLOCK: dict[str, Any] = {
    **{"quant_method": ("compressed-tensors",), "format": _FORMATS, "quantization_status": ("compressed",)},
    **{"config_groups": None, "ignore": None, "global_compression_ratio": None, "version": None},
    **{"kv_cache_scheme": (None,), "moe_sparsity_config": (None,), "transform_config": (None, {})},
    **{"sparsity_config": (None, {}), "run_compressed": (None, True, False)},
}
"""Entries of a compressed-tensors block -> their values; see `_not_allowed`. `ignore` is compared elsewhere."""

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


def foreign_block(block: Mapping[str, Any]) -> Iterator[Difference]:
    """Entries of quantization_config that would have a loader read the weights in another way."""
    if block.get("llm_int8_has_fp16_weight"):
        yield "quantization_config.llm_int8_has_fp16_weight", "False", "another"
    if block.get("quant_method") == "compressed-tensors":
        yield from _foreign_compressed_tensors(block)


def _foreign_compressed_tensors(block: Mapping[str, Any]) -> Iterator[Difference]:
    """What is neither in a block of ours nor in one that llm-compressor writes for the same arithmetic."""
    path = "quantization_config"
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
    """Entries of other values than are allowed, and entries of no known name.

    Args:
        allowed: entry -> the values that it may have, None for any; a value of None is that of no entry.
    """
    for key in sorted(entries.keys() | allowed.keys()):
        values = allowed.get(key, (None,))
        if values is not None and not any(_is_same(entries.get(key), value) for value in values):
            expected = " or ".join(json.dumps(value) for value in values)
            yield f"{path}.{key[:60]}", expected if values != (None,) else "no such entry", _shown(entries, key)


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def foreign_entries(found: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield entries that differ from the source's, except `WRITTEN_BY_OTHERS`."""
    dtype = found.get("dtype") or found.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield "dtype", f"one of {', '.join(_DTYPES)}", str(dtype)[:40]
    differing = _differing(found, source)
    added = sorted(differing - source.keys())
    if differing and len(added) <= _MOST_ADDED:
        plain, original = _without(found), _without(source)
        lacking = [{name: value for name, value in plain.items() if name != key} for key in added]
        one, other, *others = as_loaded([plain, original, *lacking])
        # What the class does not look at, another loader or version may: a base of the rotation by its older name.
        ignored = {key for key, loaded in zip(added, others, strict=True) if loaded == one} - other.keys()
        differing = (differing & _SENDS_ELSEWHERE) | ignored | _differing(one, other)
        found, source = {**found, **one}, {**source, **other}
    for key in sorted(differing):
        yield key, _shown(source, key), _shown(found, key)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    found, expected = _comparable(one), _comparable(other)
    return {key for key in found.keys() | expected.keys() if found.get(key, ...) != expected.get(key, ...)}


def _comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """Entry -> its JSON, without the entries that saving writes."""
    return {key: json.dumps(_without(value), sort_keys=True) for key, value in _without(config).items()}


def _without(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without(entry) for key, entry in value.items() if key not in WRITTEN_BY_OTHERS}


def _shown(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key])[:80] if key in config else "no such entry"
