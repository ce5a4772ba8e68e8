"""The names of transformers that int8convert uses and that are not documented API. Other modules take them from here.

Any release of transformers may change them. `tests/runtime/test_transformers_internals.py` exercises each of them, on
the installed version and on the oldest one that pyproject.toml allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, dynamic_module_utils
from transformers.conversion_mapping import get_model_conversion_mapping  # a class's renamings and conversions of keys
from transformers.core_model_loading import (
    Concatenate,  # operation of a conversion: joins tensors, such as gate and up
    ConversionOps,  # base class of operations that quantize tensor by tensor
    Interleave,  # operation of a conversion: rows of two tensors in turns
    MergeModulelist,  # operation of a conversion: stacks the experts' matrices
    SkipParameters,  # raised where a conversion fails, for transformers to report later
    Transpose,  # operation of a conversion
    WeightConverter,  # entry of the mapping that merges or splits tensors
    WeightRenaming,  # entry of the mapping that renames one tensor
    apply_renamings,  # the keys under which transformers saves
    build_glob_alternation,  # matches parameter names with the plan of dtypes
    convert_and_load_state_dict_in_model,  # loads some of a model's tensors
    dot_natural_key,  # the order in which transformers loads keys
    rename_source_key,  # the parameter that a checkpoint's key is loaded into
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # a class in the checkpoint's own code
from transformers.initialization import no_tie_weights  # builds a model with tied weights still apart
from transformers.modeling_utils import load_state_dict  # reads a `.bin` file
from transformers.quantizers.auto import AutoHfQuantizer  # chooses between the caller's quantization and the file's
from transformers.quantizers.base import (
    MODULES_TO_PATCH_FOR_QUANTIZATION,  # modules that loaders of int8 exchange for others with other weights
    _assign_is_quantized,  # marks a model as quantized, which some model code asks for
    get_keys_to_not_convert,  # the modules that loaders leave alone by default: the head and what is tied to it
)
from transformers.quantizers.quantizers_utils import (
    get_module_from_name,  # module and leaf of a parameter's name
    should_convert_module,  # reads the skip list in config.json as bitsandbytes' loader does
)
from transformers.utils.hub import cached_file  # one file of a repository, from the Hub's cache where it is there

__all__ = [
    "Concatenate",
    "ConversionOps",
    "Interleave",
    "MergeModulelist",
    "SkipParameters",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "apply_renamings",
    "cached_file",
    "convert_and_load_state_dict_in_model",
    "dot_natural_key",
    "finish_loading",
    "get_class_from_dynamic_module",
    "get_keys_to_not_convert",
    "get_model_conversion_mapping",
    "get_module_from_name",
    "is_marked_loaded",
    "kept_in_fp32",
    "load_state_dict",
    "loading_weights_by",
    "mark_loaded",
    "mark_quantized",
    "no_tie_weights",
    "not_waiting_for_consent",
    "parameter_dtypes",
    "patched_modules",
    "prefer_callers_config",
    "rename_source_key",
    "should_convert_module",
    "tied_parameters",
]


def tied_parameters(model: Any) -> dict[str, str]:
    """Return each tied parameter and the parameter whose tensor it shares, by full names."""
    found: dict[str, str] = model.all_tied_weights_keys
    return found


def kept_in_fp32(model: Any) -> list[str]:
    """Return the patterns of the modules that stay float32 whatever the model's dtype. Loaders make none int8."""
    return list(model._keep_in_fp32_modules or ())


def parameter_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Return a function from a parameter's name to the dtype that a plain load in `dtype` gives it."""
    parameters = model.state_dict()
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return lambda name: parameters[name].dtype
    alternation, glob_by_group, _ = build_glob_alternation(list(plan))

    def dtype_of(name: str) -> torch.dtype:
        match = alternation.search(name)
        found: torch.dtype = plan[glob_by_group[match.lastgroup]] if match else parameters[name].dtype
        return found

    return dtype_of


def patched_modules(model: nn.Module, method: str) -> dict[str, str]:
    """Return the modules that a quantized load exchanges for others with other weights: name -> their new class.

    Args:
        method: the `quant_method` of config.json.
    """
    patches = {
        name: MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__) for name, module in model.named_modules()
    }
    return {
        name: patch["module_name"].__name__
        for name, patch in patches.items()
        if patch and method in patch["quantization_methods"]
    }


def mark_quantized(model: Any) -> None:
    """Mark a model as quantized, as loaders do. Some model code asks for that."""
    _assign_is_quantized(model)


def mark_loaded(tensor: Any) -> None:
    """Mark a parameter or module as loaded, lest transformers draws random values for it."""
    tensor._is_hf_initialized = True


def is_marked_loaded(tensor: Any) -> bool:
    return bool(getattr(tensor, "_is_hf_initialized", False))


def finish_loading(model: Any, info: Any) -> set[str]:
    """Tie the weights; take out of `info` what the class may lack or meet. Return the keys that were missing before.

    Args:
        info: an object with `missing_keys`, `unexpected_keys`, `mismatched_keys` and `conversion_errors`.
    """
    model.mark_tied_weights_as_initialized(info)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    missing: set[str] = info.missing_keys
    model._adjust_missing_and_unexpected_keys(info)
    return missing


@contextmanager
def loading_weights_by(make: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which `from_pretrained` loads all weights by another function.

    Args:
        make: takes transformers' own function, and returns the one in its place.
    """
    load_all = PreTrainedModel._load_pretrained_model
    PreTrainedModel._load_pretrained_model = staticmethod(make(load_all))
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load_all)


@contextmanager
def not_waiting_for_consent() -> Iterator[None]:
    """Context in which transformers does not wait for the user to allow the checkpoint's code, and refuses it."""
    wait_s = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = wait_s


def prefer_callers_config(config_class: type) -> None:
    """Let a config of a class that is passed to `from_pretrained` win over the block in config.json, for good.

    transformers has no such option: it takes another class than the checkpoint's for a mistake.

    Args:
        config_class: has a method `for_checkpoint`, which takes that block and returns the config to use.
    """
    merge = AutoHfQuantizer.merge_quantization_configs

    def merge_or_callers(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, config_class):
            return quantization_config_from_args.for_checkpoint(quantization_config)  # type: ignore[attr-defined]
        return merge(quantization_config, quantization_config_from_args)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_or_callers)
