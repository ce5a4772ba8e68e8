"""The compressed-tensors format, which vLLM and SGLang serve: `P.weight` and `P.weight_scale`, absmax / 127 [out, 1].

The loader replaces whatever has Linear among its class and base classes, experts included. It has no form for Conv1D.

Source: compressed-tensors 0.20, quantization/quant_config.py and utils/match.py; vLLM 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.errors import SourceError
from int8convert.formats import foreign_compressed_tensors, scales, skip_list, transforms
from int8convert.formats.format import Format, TensorSpecs, WeightNames
from int8convert.formats.layers import is_linear
from int8convert.formats.name_pattern import PatternRefusedError, matches_start
from int8convert.text import quoted

NAMES = WeightNames("weight", "weight_scale", "weight_zero_point")
MOVED_TOGETHER: tuple[str, ...] = ()
STORES_ABSMAX = False
HOLDS_CONV1D = False
HOLDS_EXPERTS = True
KEEPS_ROUTERS = True
HAS_THRESHOLD = False
ROTATES_INPUTS = True
SHOWS_CODES = True
RUNTIME_LOADS = True
PLANNED_AS = Format.COMPRESSED_TENSORS
PACKAGES = "compressed-tensors"
VLLM_PACKAGES = "vllm"
VLLM_LOADS_EXPERTS = True
GAINS_MEMORY_ONLY = False

_LEAVES_BESIDE = (
    *("weight_scale", "weight_zero_point", "weight_g_idx", "weight_packed", "weight_shape", "weight_global_scale"),
)
_MAX_PATTERNS = 200
"""Regular expressions in one list. All modules are matched against all of them."""

_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}

dequantize = scales.dequantize_by_scale
foreign_entries = foreign_compressed_tensors.foreign_entries
from_absmax = scales.absmax_to_scale


def weight_specs(name: str, shape: tuple[int, ...]) -> TensorSpecs:
    return {name: ("I8", shape), NAMES.under(name.removesuffix(".weight")).scale: ("F32", (shape[0], 1))}


def names_beside(name: str) -> list[str]:
    return [f"{name.removesuffix('.weight')}.{leaf}" for leaf in _LEAVES_BESIDE]


def from_scale(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return scale


def to_scale(stored: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return stored


def tensors_beside(name: str, stored: npt.NDArray[np.float32]) -> dict[str, memoryview]:
    return {NAMES.under(name.removesuffix(".weight")).scale: stored.view(np.uint8).data}


def block(skip_modules: Iterable[str], threshold: float) -> dict[str, Any]:
    """Weights by row, activations by token while the model runs. A group allows no key of ours."""
    return {
        "quant_method": str(Format.COMPRESSED_TENSORS),
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": sorted(skip_modules),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
    }


def block_problem(block: Mapping[str, Any]) -> str:
    if block.get("format") not in ("int-quantized", "naive-quantized"):
        return f"format is {skip_list.shown(block.get('format'))}, expected 'int-quantized'"
    if block.get("quantization_status") != "compressed":
        return f"quantization_status is {skip_list.shown(block.get('quantization_status'))}, expected 'compressed'"
    if block.get("kv_cache_scheme") is not None:
        return "it quantizes the key-value cache too"
    if problem := transforms.transform_problem(block):
        return problem
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "it names no config_groups"
    return next(filter(None, map(_group_problem, groups.values())), "")


def _group_problem(group: Any) -> str:
    if not isinstance(group, dict):
        return "a config group is no object"
    problem = _difference("weights", group.get("weights"), {**_EIGHT_BITS, "strategy": "channel"})
    inputs = group.get("input_activations")
    if not problem and inputs is not None:
        problem = _difference("input_activations", inputs, {**_EIGHT_BITS, "dynamic": True})
    return problem or ("it quantizes output activations" if group.get("output_activations") is not None else "")


def _difference(what: str, found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return f"a config group has no {what}"
    for key, value in wanted.items():
        if found.get(key) != value:
            return f"{key} of {what} is {skip_list.shown(found.get(key))}, expected {value!r}"
    return ""


def listed_names(block: Mapping[str, Any]) -> tuple[str, ...]:
    return skip_list.listed_names(block.get("ignore"))


def leaves_alone(module_name: str, block: Mapping[str, Any]) -> bool:
    ignored = block.get("ignore")
    targets = [entries if isinstance(entries, list) else [] for entries in _targets(block)]
    is_target = any(module_name in entries or "Linear" in entries for entries in targets)
    is_listed = isinstance(ignored, list) and (module_name in ignored or "Linear" in ignored)
    return is_listed or (bool(targets) and not is_target)


def covered(module_names: Iterable[str], listed: Iterable[str]) -> set[str]:
    return set(module_names) & set(listed)


def replaces(module: Any) -> bool:
    return is_linear(module)


def int8_modules(model: Any, block: Mapping[str, Any]) -> Callable[[str, Any], bool]:
    return lambda name, module: is_linear(module) and not is_ignored(name, type(module), block)


def is_ignored(module_name: str, module_class: type, block: Mapping[str, Any]) -> bool:
    """Return whether a block leaves a Linear module as it is.

    Entries of `ignore` and of a group's `targets` are module names, names of its class or of a base class, or regular
    expressions after "re:", which match from the start of a name. Without targets, all modules are meant.

    Raises:
        SourceError: an expression is invalid, or cannot be matched in bounded time.
    """
    classes = {base.__name__ for base in module_class.__mro__}

    def is_named(entries: Any) -> bool:
        names = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        if module_name in names or not classes.isdisjoint(names):
            return True
        patterns = [name.removeprefix("re:") for name in names if name.startswith("re:")]
        if len(patterns) > _MAX_PATTERNS:
            raise SourceError(
                f"quantization_config names modules by {len(patterns):,} patterns, expected at most {_MAX_PATTERNS}",
                "name the modules in full",
            )
        return any(_matches(pattern, module_name) for pattern in patterns)

    targets = _targets(block)
    return is_named(block.get("ignore")) or (bool(targets) and not any(map(is_named, targets)))


def _targets(block: Mapping[str, Any]) -> list[Any]:
    groups = block.get("config_groups")
    return [group.get("targets") for group in groups.values()] if isinstance(groups, dict) else []


def _matches(pattern: str, module_name: str) -> bool:
    try:
        return matches_start(pattern, module_name)
    except PatternRefusedError as error:
        raise SourceError(
            f"quantization_config names modules by a pattern that is not read: {quoted(str(error))}",
            "name them in full, or export the checkpoint with int8convert, which does",
        ) from error


def file_metadata(tensors: Mapping[str, tuple[int, ...] | None], dtype: str) -> dict[str, str]:
    return {}


def merged_metadata(headers: Iterable[Mapping[str, str]], weight_names: Iterable[str]) -> dict[str, str]:
    return {}
