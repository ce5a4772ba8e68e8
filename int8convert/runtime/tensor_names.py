"""Finds the module of a loaded model that a checkpoint's tensor belongs to. transformers renames some on loading."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def live_names(model: Any, module_names: Iterable[str]) -> dict[str, str]:
    """Return module name in a checkpoint -> name in the model, without names that the model has no weight for.

    Args:
        model: a model of transformers, int8 or not; or any module, whose names then are the checkpoint's.
        module_names: tensor names without `.weight`.
    """
    names, modules = list(module_names), {name for name, _ in model.named_modules()}
    found = {name: name for name in names if name in modules}
    others = [name for name in names if name not in found]
    if not others or not hasattr(model, "base_model_prefix"):
        return found
    from int8convert.transformers_internals import (
        WeightRenaming,
        get_model_conversion_mapping,
        rename_source_key,
    )

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    parameters = model.state_dict()
    for name in others:
        key, _ = rename_source_key(f"{name}.weight", renamings, [], model.base_model_prefix, parameters)
        if key in parameters:
            found[name] = key.removesuffix(".weight")
    return found
