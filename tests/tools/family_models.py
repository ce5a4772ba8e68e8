"""A tiny, randomly initialised model of every text family that transformers knows.

1. A family is an entry of transformers' own tables: task, model type, class.
2. Its config is the class's default, made small by `shrunk_config`. Only changed entries are passed, so that what a
   class derives from them is derived anew.
3. What the rules do not fit stands in `OVERRIDES`, each entry with its reason.

What it does not know: whether a family's config exists in the wild in any such form. A family that cannot be built so
is reported as that, not as a failure of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from int8convert.planning.folding.shrunk_config import shrink

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}

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


def build_family(family: Family, seed: int = 0) -> Any:
    """A tiny model in fp32; the same bits for the same seed."""
    torch.manual_seed(seed)
    return family.model_class(tiny_config(family)).eval()
