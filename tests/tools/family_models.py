"""A tiny, randomly initialised model of every text family that transformers knows.

1. A family is an entry of transformers' own tables: task, model type, class.
2. Its config is the class's default, made small by the names of its entries: every width 64, every depth 2, and so on
   into nested configs. Only changed entries are passed, so that what a class derives from them is derived anew.
3. A list with one entry for each layer keeps one entry of every kind, so that hybrids keep all their kinds of layers.
4. What the rules do not fit stands in `OVERRIDES`, each entry with its reason.

What it does not know: whether a family's config exists in the wild in any such form. A family that cannot be built so
is reported as that, not as a failure of anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}

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

_INDEXER = {
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 2,
    "indexer_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # The heads of the state-space layers times their width must be `expand` times the hidden size.
    "mamba2": {"num_heads": 8},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    # Where attention and experts come is a period; the default one is longer than the model is deep.
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["hybrid"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    # Without a default, although the model needs it.
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "nemotron": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3},
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    # Sizes that must agree with each other, under names of their own.
    "distilbert": {"dim": 64},
    "dots3_note_text": {"head_dim": 32},
    "dots3_note": {"text_config": {"head_dim": 32}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "mobilebert": {"intra_bottleneck_size": 64, "embedding_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 5], "is_decoder": True},
    # Tables of hashes and of codes, large by themselves.
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": {"num_filters": 2},
        "semantic_tokenizer_encoder_config": {"num_filters": 2},
    },
    "blt": {"encoder_hash_byte_group_vocab": 128, "use_cache": False},
}


@dataclass(frozen=True, slots=True)
class Family:
    """One entry of transformers' tables.

    Attributes:
        task: causal, seq2seq or masked.
        model_type: as config.json spells it.
        class_name: of the model.
    """

    task: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.model_type}"

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.class_name)


def families() -> list[Family]:
    """All families, those listed under two tasks with one and the same class once."""
    found: dict[tuple[str, str], Family] = {}
    for task, names in TASKS.items():
        for model_type, class_name in names.items():
            first = class_name if isinstance(class_name, str) else class_name[0]
            found.setdefault((model_type, first), Family(task, model_type, first))
    return list(found.values())


def tiny_config(family: Family) -> Any:
    """The family's config with everything small; of a model that is the text half of another, the text half's."""
    config_class = CONFIG_MAPPING[family.model_type]
    changes = shrink(config_class())
    for key, value in OVERRIDES.get(family.model_type, {}).items():
        changes[key] = {**changes[key], **value} if isinstance(changes.get(key), dict) else value
    if family.task == "masked":
        changes.pop("is_decoder", None)
    config = config_class(**changes)
    wanted = family.model_class.config_class
    if wanted is not None and not isinstance(config, wanted):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        return next((part for part in parts if isinstance(part, wanted)), config)
    return config


def shrink(config: Any) -> dict[str, Any]:
    """The entries of a config that have to change for a tiny model, nested configs as nested dicts."""
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
    """One entry for each layer of a shallower model: every kind at least once, in the order they come in."""
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


def build_family(family: Family, seed: int = 0) -> Any:
    """A tiny model in fp32; the same bits for the same seed."""
    torch.manual_seed(seed)
    return family.model_class(tiny_config(family)).eval()
