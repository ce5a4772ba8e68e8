"""Makes a config small by the names of its entries: every width 64, every depth 2, and so on into nested configs.

A list with one entry for each layer keeps one entry of every kind, so that hybrids keep all their kinds of layers.

Does not know entries whose values must agree under names of their own: such a model cannot be built, or does not run.
"""

from __future__ import annotations

import re
from typing import Any

from int8convert.planning.model_map.sizes import kind_of

WIDTH, HEADS, HEAD_DIM, KV_HEADS, INNER, VOCABULARY, DEPTH, EXPERTS = 64, 4, 16, 2, 128, 128, 2, 4

_SMALL = {
    **{"extra layers": 0, "dense layers": 1, "expert groups": 1, "chosen experts": 2, "state groups": 2, "rank": 32},
    **{"state heads": 2 * HEADS, "heads": HEADS, "key heads": KV_HEADS, "head width": HEAD_DIM, "state": 16},
    **{"width": WIDTH, "inner width": INNER, "vocabulary": VOCABULARY, "positions": 256},
    **{"depth": DEPTH, "experts": EXPERTS},
}
_TOKEN_ID = re.compile(r".*_(token_id|token_index)")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def shrink(config: Any) -> dict[str, Any]:
    """Return the entries of a config that have to change for a small model, nested configs as nested dicts.

    Args:
        config: a config of transformers.
    """
    entries = config.to_dict()
    depth = next((entries[key] for key in _DEPTH_KEYS if isinstance(entries.get(key), int)), None)
    per_layer = {k: v for k, v in entries.items() if isinstance(v, list) and depth is not None and len(v) == depth > 1}
    n_kinds = max((len(set(v)) for v in per_layer.values() if isinstance(v[0], str)), default=1)
    changes: dict[str, Any] = {}
    for key, value in entries.items():
        small: Any = None
        if key == "per_layer_config":
            small = {}
        elif key in getattr(config, "sub_configs", {}) or (isinstance(value, dict) and "model_type" in value):
            part = getattr(config, key, None)
            small = {**shrink(part), "model_type": part.model_type} if part is not None else None
        elif key in per_layer:
            small = _shrink_list(key, value, max(DEPTH, n_kinds))
        elif isinstance(value, int) and not isinstance(value, bool):
            small = max(DEPTH, n_kinds) if key in _DEPTH_KEYS else _shrink_int(key, value)
        if small is not None:
            changes[key] = small
    heads = {entries.get(key) for key in ("num_attention_heads", "n_heads", "num_heads")}
    if entries.get("num_key_value_heads") in heads - {None} and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = HEADS
    return changes


def _shrink_list(key: str, values: list[Any], depth: int) -> list[Any]:
    """Return one entry for each layer of a shallower model: every kind at least once, in the order they come in."""
    if isinstance(values[0], str):
        kinds = list(dict.fromkeys(values))
        return kinds + [kinds[-1]] * (depth - len(kinds))
    small = [_shrink_int(key, value) if isinstance(value, int) else None for value in values[:depth]]
    return [value if tiny is None else tiny for tiny, value in zip(small, values, strict=False)]


def _shrink_int(key: str, value: int) -> int | None:
    if _TOKEN_ID.fullmatch(key):
        return value % VOCABULARY if value >= VOCABULARY else None
    small = _SMALL.get(kind_of(key) or "")
    return None if small is None else min(small, value)
