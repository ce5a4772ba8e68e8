"""Maps a checkpoint by names and shapes alone, as a fallback where transformers knows no class.

A tensor that might be an embedding, an output head, a router or a norm stays as it is. The rules do not know what the
model's code does with a weight, so their map always carries a note.
"""

from __future__ import annotations

from collections.abc import Sequence

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.planning.model_map.model_map import Action, MappedTensor, ModelMap, ModuleFilter

QUANTIZABLE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
CONFIG_DTYPE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MIN_FEATURES = 32
"""Least rows and columns of a matrix that becomes int8. Smaller ones save nothing."""

_REASON_BY_WORD = {
    "embed": "embedding",
    "wte": "embedding",
    "wpe": "embedding",
    "lm_head": "output head",
    "head": "output head",
    "classifier": "output head",
    "score": "output head",
    "router": "router",
    "norm": "not a matrix product",
    "rotary": "not a matrix product",
    "conv": "not a matrix product",
}


def map_by_name(tensors: Sequence[StoredTensor], modules: ModuleFilter, dtype: str | None, why: str) -> ModelMap:
    """Decide by name and shape.

    Args:
        dtype: the model's dtype by config.json; None takes the first tensor's.
        why: why the model's class is unknown, for the note.
    """
    candidates = [tensor for tensor in tensors if not _reason_to_keep(tensor)]
    names = [tensor.name.removesuffix(".weight") for tensor in candidates]
    modules.check_used(names)
    chosen = {name for name in names if modules.allows(name)}
    mapped = {}
    skipped = []
    for tensor in tensors:
        module_name = tensor.name.removesuffix(".weight")
        reason = _reason_to_keep(tensor) or ("" if module_name in chosen else "user skip")
        mapped[tensor.name] = MappedTensor(
            Action.KEEP if reason else Action.QUANTIZE,
            reason and f"{reason} (name rule)",
            tensor.name,
            tensor.dtype if reason else "I8",
        )
        if reason and tensor.name.endswith(".weight") and len(tensor.shape) == 2:
            skipped.append(module_name)
    return ModelMap(
        model_class=None,
        dtype=dtype or next((CONFIG_DTYPE[t.dtype] for t in tensors if t.dtype in CONFIG_DTYPE), "float32"),
        tensors=mapped,
        skip_modules=tuple(sorted(skipped)),
        output_format=modules.output_format,
        notes=(f"{why}: Linear weights were chosen by name and shape; check the plan before converting",),
    )


def _reason_to_keep(tensor: StoredTensor) -> str:
    if not tensor.name.endswith(".weight") or len(tensor.shape) != 2 or tensor.dtype not in QUANTIZABLE_DTYPES:
        return "not a matrix product"
    parts = tensor.name.lower().split(".")[:-1]
    if parts[-1] == "gate":
        return "router"
    for word, reason in _REASON_BY_WORD.items():
        if word in parts[-1] or (word == "embed" and any(word in part for part in parts)):
            return reason
    return "not a matrix product" if min(tensor.shape) < MIN_FEATURES else ""
