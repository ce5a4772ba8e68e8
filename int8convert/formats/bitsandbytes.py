"""The bitsandbytes format, which transformers loads: `P.weight`, `P.SCB` and `P.weight_format`.

`P.SCB` is the row's absmax. The loader replaces Linear layers, but no subclasses, and Conv1D; it holds no int8 experts.

Source: bitsandbytes 0.50 and transformers 5.24, integrations/bitsandbytes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.formats import scales, skip_list
from int8convert.formats.format import Difference, Format, TensorSpecs, WeightNames
from int8convert.formats.layers import is_conv1d_layer, is_plain_linear

NAMES = WeightNames("weight", "SCB", "weight_format")
MOVED_TOGETHER: tuple[str, ...] = ("weight", "SCB", "weight_format")
STORES_ABSMAX = True
HOLDS_CONV1D = True
HOLDS_EXPERTS = False  # transformers fuses experts into one parameter, for which it has no int8 form
KEEPS_ROUTERS = False
HAS_THRESHOLD = True
ROTATES_INPUTS = False
SHOWS_CODES = True
RUNTIME_LOADS = True
PLANNED_AS = Format.BITSANDBYTES
PACKAGES = "bitsandbytes"
VLLM_PACKAGES = "vllm vllm-bnb-plugin"
VLLM_LOADS_EXPERTS = False  # vLLM 0.32 with vllm-bnb-plugin 0.0.3
GAINS_MEMORY_ONLY = True  # LLM.int8(), arXiv:2208.07339, Appendix D

_SKIP_KEY = "llm_int8_skip_modules"

dequantize = scales.dequantize_by_absmax
covered = skip_list.covered
from_scale = scales.scale_to_absmax
to_scale = scales.absmax_to_scale


def weight_specs(name: str, shape: tuple[int, ...]) -> TensorSpecs:
    names = NAMES.under(name.removesuffix(".weight"))
    return {name: ("I8", shape), names.scale: ("F32", shape[:1]), names.zeros: ("U8", ())}


def names_beside(name: str) -> list[str]:
    names = NAMES.under(name.removesuffix(".weight"))
    return [names.scale, names.zeros]


def from_absmax(absmax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return absmax


def tensors_beside(name: str, stored: npt.NDArray[np.float32]) -> dict[str, memoryview]:
    names = NAMES.under(name.removesuffix(".weight"))
    return {names.scale: stored.view(np.uint8).data, names.zeros: memoryview(b"\0")}


def block(skip_modules: Iterable[str], threshold: float) -> dict[str, Any]:
    return {
        "quant_method": str(Format.BITSANDBYTES),
        "load_in_8bit": True,
        "llm_int8_threshold": float(threshold),  # transformers refuses an int
        _SKIP_KEY: sorted(skip_modules),  # complete: the list replaces the loader's default
    }


def block_problem(block: Mapping[str, Any]) -> str:
    is_8_bit = block.get("load_in_8bit") or block.get("_load_in_8bit")
    is_4_bit = block.get("load_in_4bit") or block.get("_load_in_4bit")
    return "" if is_8_bit is True and not is_4_bit else "its weights are not 8-bit"


def listed_names(block: Mapping[str, Any]) -> tuple[str, ...]:
    return skip_list.listed_names(block.get(_SKIP_KEY))


def leaves_alone(module_name: str, block: Mapping[str, Any]) -> bool:
    return skip_list.is_named(module_name, listed_names(block))


def replaces(module: Any) -> bool:
    return is_plain_linear(module) or is_conv1d_layer(module)


def int8_modules(model: Any, block: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    skips = skip_list.loader_rule(model, block, _SKIP_KEY)
    return lambda name, module: replaces(module) and not skips(name)


def foreign_entries(block: Mapping[str, Any]) -> Iterator[Difference]:
    if block.get("llm_int8_has_fp16_weight"):
        yield "quantization_config.llm_int8_has_fp16_weight", "False", "another"


def file_metadata(tensors: Mapping[str, tuple[int, ...] | None], dtype: str) -> dict[str, str]:
    return {}


def merged_metadata(headers: Iterable[Mapping[str, str]], weight_names: Iterable[str]) -> dict[str, str]:
    return {}
