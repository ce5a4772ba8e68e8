"""The torchao format, which only `export` writes: `P._weight_qdata`, `P._weight_scale` and `P._weight_zero_point`.

Every file's header names all tensors of the model, not its own alone, and says what to make of their parts:
transformers merges the headers and believes the last one.

The form is weight-only. torchao's other int8 form rounds outlier features to 8 bits with all others, which LLM.int8()
exists to avoid; it is read, since its codes mean the same.

Source: torchao 0.18, prototype/safetensors and core/config.py; transformers 5.24, integrations/torchao.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.errors import CorruptFileError
from int8convert.formats import scales, skip_list
from int8convert.formats.format import Difference, Format, TensorSpecs, WeightNames
from int8convert.formats.layers import is_linear
from int8convert.text import quoted

NAMES = WeightNames("_weight_qdata", "_weight_scale", "_weight_zero_point")
MOVED_TOGETHER: tuple[str, ...] = ()
STORES_ABSMAX = False
HOLDS_CONV1D = False
HOLDS_EXPERTS = False
KEEPS_ROUTERS = False
HAS_THRESHOLD = False
ROTATES_INPUTS = False
SHOWS_CODES = False  # its tensors look like floats to model code
RUNTIME_LOADS = False
PLANNED_AS = Format.COMPRESSED_TENSORS
PACKAGES = "torchao"
VLLM_PACKAGES = "vllm torchao"
VLLM_LOADS_EXPERTS = True
GAINS_MEMORY_ONLY = False

_SKIP_KEY = "modules_to_not_convert"
_TYPES = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
_PLAIN = json.dumps({"_type": "Tensor"})

dequantize = scales.dequantize_by_scale
covered = skip_list.covered
from_absmax = scales.absmax_to_scale


def weight_specs(name: str, shape: tuple[int, ...]) -> TensorSpecs:
    names = NAMES.under(name.removesuffix(".weight"))
    one_a_row = (shape[0], 1)
    return {names.codes: ("I8", shape), names.scale: ("F32", one_a_row), names.zeros: ("I8", one_a_row)}


def names_beside(name: str) -> list[str]:
    names = NAMES.under(name.removesuffix(".weight"))
    return [names.scale, names.zeros]


def from_scale(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return scale


def to_scale(stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return stored


def tensors_beside(name: str, stored: npt.NDArray[np.float32]) -> dict[str, memoryview]:
    names = NAMES.under(name.removesuffix(".weight"))
    return {names.scale: stored.view(np.uint8).data, names.zeros: memoryview(bytes(stored.size))}


def block(skip_modules: Iterable[str], threshold: float) -> dict[str, Any]:
    granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    weight_only = {"group_size": None, "granularity": granularity, "set_inductor_config": True}
    return {
        "quant_method": str(Format.TORCHAO),
        "quant_type": {"default": {"_type": _TYPES[0], "_version": 2, "_data": weight_only}},
        _SKIP_KEY: sorted(skip_modules),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def block_problem(block: Mapping[str, Any]) -> str:
    kinds = block.get("quant_type")
    kind = kinds.get("default") if isinstance(kinds, dict) and len(kinds) == 1 else None
    if not isinstance(kind, dict) or kind.get("_type") not in _TYPES:
        return f"quant_type is not one of {', '.join(_TYPES)}"
    return ""


def listed_names(block: Mapping[str, Any]) -> tuple[str, ...]:
    return skip_list.listed_names(block.get(_SKIP_KEY))


def leaves_alone(module_name: str, block: Mapping[str, Any]) -> bool:
    return skip_list.is_named(module_name, listed_names(block))


def replaces(module: Any) -> bool:
    return is_linear(module)


def int8_modules(model: Any, block: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    skips = skip_list.loader_rule(model, block, _SKIP_KEY)
    return lambda name, module: is_linear(module) and not skips(name)


def foreign_entries(block: Mapping[str, Any]) -> Iterator[Difference]:
    if block.get("llm_int8_has_fp16_weight"):
        yield "quantization_config.llm_int8_has_fp16_weight", "False", "another"


def file_metadata(tensors: Mapping[str, tuple[int, ...] | None], dtype: str) -> dict[str, str]:
    entries = {name: _PLAIN if shape is None else _int8_tensor(shape[1], dtype) for name, shape in tensors.items()}
    return {**entries, "tensor_names": json.dumps(list(entries))}


def merged_metadata(headers: Iterable[Mapping[str, str]], weight_names: Iterable[str]) -> dict[str, str]:
    merged = {name: value for header in headers for name, value in header.items()}
    entries = {name: value for name, value in merged.items() if value.startswith('{"_type"')}
    for name in weight_names:
        if name not in entries:
            raise CorruptFileError(
                f"no header describes {quoted(name)}, so torchao cannot read it",
                "fetch the checkpoint again, or name another format with --format",
            )
    return {**entries, "tensor_names": json.dumps(list(entries))}


def _int8_tensor(n_columns: int, dtype: str) -> str:
    """Return the entry of a weight with one scale a row, by which 16-bit activations are multiplied.

    Args:
        dtype: what the weight is dequantized to.
    """
    attributes = {
        "act_quant_kwargs": None,
        "reduce_range": False,
        "block_size": [1, n_columns],
        "dtype": {"_type": "torch.dtype", "_data": dtype},
    }
    parts = ["zero_point", "qdata", "scale"]
    return json.dumps({"_type": "Int8Tensor", "_data": attributes, "_tensor_data_names": parts})
