"""Low-bit forms that are refused, and what would be wrong if their weights were decoded by the names they share.

Does not know forms that it does not list: their codes belong to no format here, so the checkpoint is refused as well,
without a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.checkpoint.source import CheckpointSource
from int8convert.decoding.coding import quantization_block
from int8convert.errors import AlreadyQuantizedError
from int8convert.formats.config import BLOCK
from int8convert.formats.format import Format
from int8convert.formats.modules import module_of
from int8convert.text import quoted

_NAMES = {
    ".pre_quant_scale": "inputs are multiplied by it while the model runs, so the weights alone give other outputs",
    ".svdquant_lora_a": "the weights are only part of a sum: a low-rank product is added while the model runs",
    ".svdquant_lora_b": "the weights are only part of a sum: a low-rank product is added while the model runs",
}
"""End of a tensor's name -> what would be wrong."""

_CODEBOOKS = "its codes are indices of codebooks, not numbers"
_REORDERED = "its words hold the codes in another order under the same names, so every weight would be another's"
_METHODS = {
    **dict.fromkeys(("aqlm", "vptq", "quip", "higgs", "exl2", "exl3"), _CODEBOOKS),
    **dict.fromkeys(("marlin", "qqq"), _REORDERED),
    "hqq": "its scales are quantized themselves, in a form of its own",
    "gguf": "its blocks mix codes and scales of several layouts",
    "spqr": "its outliers are stored apart, and the rest alone gives other outputs",
}
"""Quantization method -> what would be wrong."""

_PACKINGS = ("marlin", "marlin_24", "gptq_p", "gemv", "gemv_fast", "llm-awq", "bitblas", "awq_marlin", "gptq_marlin")


def check_readable(source: CheckpointSource) -> None:
    """Refuse a checkpoint in a form whose weights would be decoded wrongly.

    Raises:
        AlreadyQuantizedError: it is in one of them.
    """
    block = quantization_block(source.config)
    for what, why in (*_by_config(block), *_by_names(source)):
        raise AlreadyQuantizedError(
            f"the source is quantized with {what}, which is not decoded: {why}",
            "convert the 16-bit checkpoint it was made from",
        )
    found = _int8_format(source)
    if found is not None:
        raise AlreadyQuantizedError(
            f"the source is quantized already: its weights are the int8 of {found}, which to quantize again would lose",
            "run `int8convert export SRC OUT --format FORMAT`, which keeps the codes",
        )


def _int8_format(source: CheckpointSource) -> Format | None:
    """Return the format of an int8 checkpoint that `export` reads; None of any other."""
    block: Any = source.config.get(BLOCK)
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method not in tuple(Format) or module_of(Format(method)).block_problem(block):
        return None
    names = module_of(Format(method)).NAMES
    dtypes = {tensor.name: tensor.dtype for tensor in source.tensors}
    modules = {name.removesuffix(f".{names.codes}") for name, dtype in dtypes.items() if dtype == "I8"}
    is_int8 = bool(modules) and all(f"{module}.{names.scale}" in dtypes for module in modules)
    return Format(method) if is_int8 else None


def _by_config(block: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method = block.get("quant_method")
    if isinstance(method, str) and method.lower() in _METHODS:
        yield f"quant_method {quoted(method)}", _METHODS[method.lower()]
    for key in ("checkpoint_format", "format", "packing_format", "version", "backend"):
        value = block.get(key)
        packing = value.lower().rpartition(":")[2].replace("-24", "_24") if isinstance(value, str) else ""
        if packing in _PACKINGS:
            yield f"{key} {quoted(str(value))}", _REORDERED
    if block.get("is_marlin_format"):
        yield "is_marlin_format", _REORDERED
    if block.get("transform_config"):
        yield "a transform_config", "its weights are rotated, and inputs are rotated with them while the model runs"
    sparsity = block.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        yield "a sparsity_config", "its weights without the zeros are stored, at places of their own"
    if "mxfp6" in str(block.get("format")).lower():
        yield "6-bit floats", "four codes share three bytes, in an order that no loader here reads"


def _by_names(source: CheckpointSource) -> Iterator[tuple[str, str]]:
    endings = tuple(_NAMES)
    for tensor in source.tensors:
        if tensor.name.endswith(endings):
            yield quoted(tensor.name), next(why for end, why in _NAMES.items() if tensor.name.endswith(end))
