"""Makes a config small by the names of its entries: every width 64, every depth 2, and so on into nested configs.

A list with one entry for each layer keeps one entry of every kind, so that hybrids keep all their kinds of layers.

Does not know entries whose values must agree under names of their own: such a model cannot be built, or does not run.
"""

from __future__ import annotations

import re
from typing import Any

WIDTH, HEADS, HEAD_DIM, KV_HEADS, INNER, VOCABULARY, DEPTH, EXPERTS = 64, 4, 16, 2, 128, 128, 2, 4

_RULES: tuple[tuple[str, int], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 2 * HEADS),
    (r"(num_|n_)?(key_value|kv)_heads|kv_n_heads|n_head_kv|num_attention_groups", KV_HEADS),
    (r".*(moe|shared_expert|shared_experts|expert)_(intermediate_size|hidden_size|ffn_dim)|.*ffn_hidden_size", WIDTH),
    (r".*intermediate_size|.*ffn_dim|n_inner|d_ff|inner_size|feed_forward_size|hidden_dim|dim_ff|d_inner", INNER),
    (
        r"(?!attention_)(.*_)?(hidden_size(_global)?|embed_dim|embed_size|d_model|n_embd|emb_dim|embedding_size|lru_width"
        r"|word_embed_proj_dim|model_dim|hidden_size_per_layer_input|d_latents|embedding_dim)",
        WIDTH,
    ),
    (r"(?!d_head)(.*_)?(num_|n_)?(attention_heads|heads?)", HEADS),
    (r"(?!qk_head_dim|attention_head_dim)(.*_)?(head_dim|d_kv|head_size|rotary_dim)|mamba_d_head", HEAD_DIM),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)", DEPTH),
    (r"n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts", EXPERTS),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 2),
    (r".*_lora_rank|embedding_rank|adapter_rank", 32),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions", 256),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _RULES)
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
    small = next((small for pattern, small in _COMPILED if pattern.fullmatch(key)), None)
    return None if small is None else min(small, value)
