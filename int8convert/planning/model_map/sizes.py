"""Reads config.json as sizes, entries that never change a model's modules, and everything else.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_KINDS: tuple[tuple[str, str], ...] = (
    (r"num_kv_shared_layers|num_nextn_predict_layers", "extra layers"),
    (r"first_k_dense_replace|num_dense_layers", "dense layers"),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", "state heads"),
    (r"(num_|n_)?(key_value|kv)_heads|kv_n_heads|n_head_kv|num_attention_groups", "key heads"),
    (r".*(moe|shared_expert|shared_experts|expert)_(intermediate_size|hidden_size|ffn_dim)|.*ffn_hidden_size", "width"),
    (
        r".*intermediate_size|.*ffn_dim|n_inner|d_ff|inner_size|feed_forward_size|hidden_dim|dim_ff|d_inner",
        "inner width",
    ),
    (
        r"(?!attention_)(.*_)?(hidden_size(_global)?|embed_dim|embed_size|d_model|n_embd|emb_dim|embedding_size|lru_width"
        r"|word_embed_proj_dim|model_dim|hidden_size_per_layer_input|d_latents|embedding_dim)",
        "width",
    ),
    (r"(?!d_head)(.*_)?(num_|n_)?(attention_heads|heads?)", "heads"),
    (r"(?!qk_head_dim|attention_head_dim)(.*_)?(head_dim|d_kv|head_size|rotary_dim)|mamba_d_head", "head width"),
    (r"(.*_)?(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)", "depth"),
    (r"n_routed_experts|num_local_experts|num_experts|moe_num_experts|n_experts", "experts"),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token", "chosen experts"),
    (r"n_group|num_expert_group|topk_group", "expert groups"),
    (r"n_groups|mamba_n_groups|mamba_ngroups", "state groups"),
    (r".*_lora_rank|embedding_rank|adapter_rank", "rank"),
    (r"mamba_d_state|state_size|ssm_state_size", "state"),
    (r"(.*_)?vocab_size(_.*)?", "vocabulary"),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|max_source_positions", "positions"),
)
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _KINDS)

_SIZES = {
    *("state heads", "key heads", "width", "inner width", "heads", "head width", "depth", "experts", "state groups"),
    *("rank", "state", "vocabulary", "positions", "dense layers"),
}

_MAX_SIZE, _MAX_SIZES, _MAX_LENGTH = 1 << 24, 200, 200
"""Bounds of a size, of the number of sizes, and of the length of a name: a stranger wrote config.json."""

_LAYER_LISTS = re.compile(r"layer_types|mlp_layer_types|layers_block_type")

_DTYPES = {"dtype", "torch_dtype"}
_HARMLESS: tuple[tuple[re.Pattern[str], tuple[type, ...]], ...] = (
    (re.compile(r"_?name_or_path|transformers_version|_?attn_implementation|unsloth_version|prefix"), (str,)),
    (
        re.compile(
            r"use_cache|use_sliding_window|output_(hidden_states|router_logits)|return_dict|norm_topk_prob"
            r"|_attn_implementation_autoset|unsloth_fixed"
        ),
        (bool,),
    ),
    (
        re.compile(
            r"initializer_(range|factor)|init_std|rope_theta|rope_local_base_freq|rotary_emb_base"
            r"|_?sliding_window(_pattern)?|max_window_layers|query_pre_attn_scalar"
            r"|(embedding|residual|attention)_multiplier|logits_scaling|routed_scaling_factor"
            r"|num_experts_per_tok|n_group|topk_group|qk_head_dim|router_(aux_loss|z_loss)_coef(ficient)?"
        ),
        (int, float),
    ),
    (re.compile(r"(.*_)?(eps|epsilon)|(attn|final)_logit_softcapping|logit_scale"), (float,)),
    (re.compile(r"auto_map|task_specific_params"), (dict,)),
)
"""Names of entries that change no module, and the types of their values; any may be null."""
_DROPOUT = re.compile(r"(.*_)?(dropout(_(rate|prob|p))?|pdrop|layerdrop|drop_rate)")
_TOKEN_IDS = re.compile(r"(.*_)?token_ids?")
_ROPE = {"rope_scaling", "rope_parameters"}
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
}

Sizes = Mapping[str, int]


class UnknownStructureError(Exception):
    """Raised where a checkpoint or its config has no structure that could be compared. The child process decides."""


def kind_of(name: str) -> str | None:
    """Return what an entry of a config counts, by its name: `width`, `heads`, `depth`; None for any other entry."""
    return next((kind for pattern, kind in _COMPILED if pattern.fullmatch(name)), None)


@cache
def kind_at(path: str) -> str | None:
    return kind_of(path.rpartition(".")[2])


@dataclass(slots=True)
class ConfigParts:
    """The entries of config.json by their dotted path, without the harmless ones and the dtype.

    Attributes:
        sizes: positive numbers that only scale shapes and repeat layers.
        layer_lists: lists with the kind of each layer.
        flags: everything else.
        rope_types: types of rotary embeddings, which change no module. Some classes refuse all but a few.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    layer_lists: dict[str, list[str]] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    rope_types: set[str] = field(default_factory=set)

    def add(self, config: Mapping[str, Any], scope: str = "") -> None:
        """Add the entries of a config, or of the part of one that `scope` names, with a dot at its end."""
        for key, value in config.items():
            path = scope + key
            if key in _ROPE and (rope_type := _rope_type(value)) is not None:
                self.rope_types.add(rope_type)
                continue
            if _is_harmless(key, value, config) or (not scope and key in _DTYPES):
                continue
            if isinstance(value, dict) and value and len(scope) < _MAX_LENGTH and not key.endswith(("2label", "2id")):
                self.add(value, f"{path}.")
            elif _LAYER_LISTS.fullmatch(key) and isinstance(value, list) and all(isinstance(v, str) for v in value):
                self.layer_lists[path] = value
            elif len(key) < _MAX_LENGTH and kind_of(key) in _SIZES and type(value) is int and 0 < value <= _MAX_SIZE:
                self.sizes[path] = value
            elif _DROPOUT.fullmatch(key) and type(value) in (int, float):
                self.flags[path] = value > 0  # some classes refuse any
            else:
                self.flags[path] = value


def read_config(config: Mapping[str, Any]) -> ConfigParts:
    """Return the parts of config.json. Of the architectures only the first counts.

    Raises:
        UnknownStructureError: it has too many sizes.
    """
    parts = ConfigParts()
    parts.add({**config, "architectures": config["architectures"][:1]})
    if len(parts.sizes) > _MAX_SIZES:
        raise UnknownStructureError(f"{len(parts.sizes)} sizes")
    return parts


def _is_harmless(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    """Return whether an entry leaves the modules alone, and is not what transformers would refuse."""
    if key in ("gradient_checkpointing", "output_attentions"):
        return value is False  # what they are refused for depends on the class
    if _TOKEN_IDS.fullmatch(key):
        # A padding token beyond the vocabulary fails when the embedding is made.
        stated = config.get("vocab_size")
        n_words = (stated if type(stated) is int else 0) if key == "pad_token_id" else _MAX_SIZE
        ids = value if isinstance(value, list) else [value]
        return all(each is None or (type(each) is int and -1 <= each < n_words) for each in ids)
    return any(pattern.fullmatch(key) and (value is None or type(value) in types) for pattern, types in _HARMLESS)


def _rope_type(value: Any) -> str | None:
    """Return the type of rotary embeddings; None where it is unknown, or an entry that it needs is absent."""
    entries = {} if value is None else value
    if not isinstance(entries, dict) or any(isinstance(each, dict) for each in entries.values()):
        return None
    rope_type = entries.get("rope_type", entries.get("type", "default"))
    needed = _ROPE_KEYS.get(rope_type) if isinstance(rope_type, str) else None
    is_known = needed is not None and all(isinstance(entries.get(key), int | float) for key in needed)
    return rope_type if is_known else None
