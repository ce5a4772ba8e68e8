"""Describes a model that was quantized in memory in its config, without which its codes would load as weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

from int8convert.errors import FormatError
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.stored_columns import StoredOutliers, save_with_outliers
from int8convert.transformers_internals import kept_in_fp32


def describe_for_saving(
    model: Any, lost: Iterable[str], threshold: float, stored: Mapping[str, StoredOutliers]
) -> None:
    """Set the quantization block of a transformers model's config; refuse saving if no loader could read the model.

    Args:
        lost: int8 modules that the loader does not replace.
        stored: module -> outlier columns.
    """
    layout = module_of(Format.BITSANDBYTES)
    left = [name for name, module in model.named_modules() if layout.replaces(module)]
    int8 = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
    covered = layout.covered(int8, [*left, *kept_in_fp32(model)])
    lost = [*lost, *(name for name in int8 if name in covered)]
    if lost:
        model._int8convert_unloadable = lost[0]
        model.save_pretrained = MethodType(_refuse_to_save, model)
        return
    model.config.quantization_config = layout.block(left, threshold)
    if stored:
        model.save_pretrained = MethodType(save_with_outliers, model)


def _refuse_to_save(model: Any, *_: Any, **__: Any) -> None:
    raise FormatError(
        f"no loader would look for '{model._int8convert_unloadable}' as int8, so this model cannot be saved",
        "leave that module out with quantize_(skip=...)",
    )
