"""config.json of an int8 checkpoint: written with the block by which a loader knows what it reads, and read.

A config is a stranger's: no entry is taken to be of the type it should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from int8convert.checkpoint.loaders.config import without_detours
from int8convert.errors import SourceError
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.formats.transforms import with_transforms
from int8convert.text import quoted

BLOCK = "quantization_config"
_OTHER_ENTRIES = ("compression_config", "expert_dtype")
"""Entries beside the block that tell how a source is quantized."""


def int8_config(
    config: Mapping[str, Any],
    format: Format,
    dtype: str,
    skip_modules: Iterable[str],
    threshold: float,
    rotated_inputs: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the source's config.json with the block that makes a format's loader read the int8 weights.

    Args:
        dtype: written where the config names none. Loaders then take that of the first float tensor, which may be a
            scale.
        skip_modules, threshold: see `FormatModule.block`.
        rotated_inputs: modules whose inputs the loader is to rotate, see `transforms`.
    """
    has_dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        **_unquantized(config),
        **({} if has_dtype else {"torch_dtype": dtype}),
        BLOCK: with_transforms(module_of(format).block(skip_modules, threshold), rotated_inputs),
    }


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the source's config.json for weights that are not quantized, to be loaded in `dtype`."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    kept = {key: value for key, value in _unquantized(config).items() if key != BLOCK}
    return {**kept, **dict.fromkeys(names, dtype)}


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that the output takes over: how the source is quantized is told by its own block alone."""
    kept = {key: value for key, value in without_detours(config).items() if key not in _OTHER_ENTRIES}
    text = kept.get("text_config")
    if isinstance(text, dict) and BLOCK in text:
        kept["text_config"] = {key: value for key, value in text.items() if key != BLOCK}
    return kept


def read_format(config: Mapping[str, Any], label: str = "the source") -> Format:
    """Return the format that a config.json names.

    Args:
        label: the checkpoint's name in errors.

    Raises:
        SourceError: config.json names none, another one, or a variant in which int8 codes mean something else.
    """
    block = config.get(BLOCK)
    if block is None:
        missing = "has no quantization_config" if config else "is missing"
        raise SourceError(
            f"{label} is no int8 checkpoint: its config.json {missing}",
            "give an output of int8convert quantize, or finish the conversion first",
        )
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method not in tuple(Format):
        raise SourceError(
            f"{label} is quantized by {quoted(method) if isinstance(method, str) else 'an unnamed method'}, "
            f"expected {', '.join(Format)}",
            "convert the 16-bit checkpoint it was made from",
        )
    found = Format(method)
    problem = module_of(found).block_problem(block)
    if problem:
        raise SourceError(
            f"the {found} weights of the source are not those of LLM.int8(): {problem}",
            "give a checkpoint with one scale for each row and no zero point",
        )
    return found


def read_threshold(config: Mapping[str, Any], default: float) -> float:
    """Return the outlier threshold of an int8 checkpoint; `default` where its block has none."""
    threshold = config[BLOCK].get("llm_int8_threshold")
    is_threshold = isinstance(threshold, int | float) and not isinstance(threshold, bool) and 0 <= threshold < 3e38
    return float(threshold) if is_threshold else default
