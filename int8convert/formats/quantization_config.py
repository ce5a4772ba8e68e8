"""config.json of an int8 checkpoint, by whose block a loader knows what it reads, and the index beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from int8convert.checkpoint.loaders.config import without_detours


def build_index(weight_map: Mapping[str, str], n_bytes: int, n_parameters: int) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    return {
        "metadata": {"total_parameters": n_parameters, "total_size": n_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }


def bitsandbytes_config(
    config: Mapping[str, Any], dtype: str, threshold: float, skip_modules: Iterable[str]
) -> dict[str, Any]:
    """The source's config.json with the block that makes transformers load the int8 weights through bitsandbytes.

    The skip list replaces the loader's own default, so it must be complete. The threshold is written as a float:
    transformers refuses an int.

    Args:
        dtype: written where the config names none.
    """
    return {
        **without_detours(config),
        **_dtype_if_missing(config, dtype),
        "quantization_config": bitsandbytes_block(threshold, skip_modules),
    }


def bitsandbytes_block(threshold: float, skip_modules: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in the bitsandbytes layout; see `bitsandbytes_config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": float(threshold),
        "llm_int8_skip_modules": sorted(skip_modules),
    }


def compressed_tensors_config(config: Mapping[str, Any], dtype: str, ignore: Iterable[str]) -> dict[str, Any]:
    """The source's config.json with the block by which compressed-tensors and vLLM read the int8 weights.

    Weights by row, symmetric; activations by token, symmetric, quantized while it runs. The block's groups allow no key
    of ours.

    Args:
        dtype: written where the config names none.
        ignore: full names of every Linear module that stays 16-bit; all others are taken to be int8.

    Source: compressed_tensors/quantization/quant_config.py, version 0.20.
    """
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        **without_detours(config),
        **_dtype_if_missing(config, dtype),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": sorted(ignore),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                    "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
                }
            },
        },
    }


def torchao_config(config: Mapping[str, Any], dtype: str, skip_modules: Iterable[str]) -> dict[str, Any]:
    """The source's config.json with the block by which transformers reads the int8 weights through torchao.

    Weight-only: what is known of the weights is said, and nothing about activations. torchao's other int8 form rounds
    outlier features to 8 bits with all others, which LLM.int8() is there to avoid.

    Source: torchao/core/config.py, version 0.18.
    """
    granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    weight_only = {"group_size": None, "granularity": granularity, "set_inductor_config": True}
    return {
        **without_detours(config),
        **_dtype_if_missing(config, dtype),
        "quantization_config": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": weight_only}},
            "modules_to_not_convert": sorted(skip_modules),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        },
    }


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config.json for weights that are not quantized, to be loaded in `dtype`."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    kept = {key: value for key, value in without_detours(config).items() if key != "quantization_config"}
    return {**kept, **dict.fromkeys(names, dtype)}


def _dtype_if_missing(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """Loaders go by the first float tensor where the config names no dtype, which may be that of a scale."""
    return {} if config.get("dtype") or config.get("torch_dtype") else {"torch_dtype": dtype}
