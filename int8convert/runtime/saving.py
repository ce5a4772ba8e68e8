"""What a model quantized in memory says of itself when it is saved: without that, its codes would load as weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from int8convert.errors import FormatError
from int8convert.formats.quantization_config import bitsandbytes_block
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.stored_columns import StoredOutliers, save_with_outliers
from int8convert.runtime.transformers_internals import Conv1D, kept_in_fp32, should_convert_module


def describe_for_saving(
    model: Any, replaced: Mapping[str, type], threshold: float, stored: Mapping[str, StoredOutliers]
) -> None:
    """Give a transformers model the block its config.json needs; or refuse to save it, if no loader could read it.

    Args:
        replaced: the modules that have become int8, and what they were.
        stored: outlier columns, by module.
    """
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    # transformers reads a skipped name as a tail or the beginning of others, too.
    skips = [*left, *kept_in_fp32(model)]
    int8 = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    lost = [name for name, kind in replaced.items() if kind is not nn.Linear and not issubclass(kind, Conv1D)]
    lost += [name for name in int8 if not should_convert_module(name, skips)]
    if lost:
        model._int8convert_unloadable = lost[0]
        model.save_pretrained = MethodType(_refuse_to_save, model)
        return
    model.config.quantization_config = bitsandbytes_block(threshold, left)
    if stored:
        model.save_pretrained = MethodType(save_with_outliers, model)


def _refuse_to_save(model: Any, *_: Any, **__: Any) -> None:
    raise FormatError(
        f"no loader would look for '{model._int8convert_unloadable}' as int8, so this model cannot be saved",
        "save it before quantize_, and let int8convert quantize convert it; or quantize_ with skip",
    )
