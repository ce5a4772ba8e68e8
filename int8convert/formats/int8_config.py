"""What the config.json of an int8 checkpoint says: its format, that we understand it, what stayed 16-bit, Conv1D.

A config is a stranger's: no entry is taken to be of the type it should be, and no pattern in it is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from int8convert.errors import SourceError
from int8convert.formats.name_pattern import PatternRefusedError, TailPatterns
from int8convert.text import quoted


class Int8Format(StrEnum):
    """A way to write int8 weights, by the name config.json gives it as `quant_method`."""

    BITSANDBYTES = "bitsandbytes"
    COMPRESSED_TENSORS = "compressed-tensors"
    TORCHAO = "torchao"


_SKIP_KEY = {
    Int8Format.BITSANDBYTES: "llm_int8_skip_modules",
    Int8Format.COMPRESSED_TENSORS: "ignore",
    Int8Format.TORCHAO: "modules_to_not_convert",
}
_TORCHAO_TYPES = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")
_CONV1D_MODEL_TYPES = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
"""Those of transformers 5.23; a test reads its source for others."""

CONV1D_NAMES = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
MAX_SKIPPED, MAX_NAME_LENGTH = 20_000, 500
"""Names in a skip list, and characters of one. A list that names each projection of each expert has some thousands."""

_MODULE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def read_format(config: Mapping[str, Any], label: str = "the source") -> Int8Format:
    """The format a config.json names.

    Args:
        label: what it is the config of, for errors.

    Raises:
        SourceError: it names none, another one, or a variant in which int8 codes mean something else.
    """
    block = config.get("quantization_config")
    if block is None:
        missing = "has no quantization_config" if config else "is missing"
        raise SourceError(
            f"{label} is no int8 checkpoint: its config.json {missing}",
            "give an output of int8convert quantize, or finish the conversion first",
        )
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method not in tuple(Int8Format):
        raise SourceError(
            f"{label} is quantized by {quoted(method) if isinstance(method, str) else 'an unnamed method'}, "
            f"expected {', '.join(Int8Format)}",
            "convert the 16-bit checkpoint it was made from",
        )
    found = Int8Format(method)
    problem = _PROBLEM[found](block)
    if problem:
        raise SourceError(
            f"the source is of a kind of {found} that is not LLM.int8()'s: {problem}",
            "export reads int8 weights with one scale a row and no zero point",
        )
    return found


def _bitsandbytes_problem(block: Mapping[str, Any]) -> str:
    is_8_bit = block.get("load_in_8bit") or block.get("_load_in_8bit")
    is_4_bit = block.get("load_in_4bit") or block.get("_load_in_4bit")
    return "" if is_8_bit is True and not is_4_bit else "its weights are not 8-bit"


def _compressed_tensors_problem(block: Mapping[str, Any]) -> str:
    if block.get("format") not in ("int-quantized", "naive-quantized"):
        return f"format is {_shown(block.get('format'))}, expected 'int-quantized'"
    if block.get("quantization_status") != "compressed":
        return f"quantization_status is {_shown(block.get('quantization_status'))}, expected 'compressed'"
    if block.get("kv_cache_scheme") is not None:
        return "it quantizes the key-value cache too"
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "it names no config_groups"
    wanted_weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    wanted_inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    for group in groups.values():
        if not isinstance(group, dict):
            return "a config group is no object"
        problem = _difference("weights", group.get("weights"), wanted_weights)
        if group.get("input_activations") is not None:
            problem = problem or _difference("input_activations", group["input_activations"], wanted_inputs)
        if problem or group.get("output_activations") is not None:
            return problem or "it quantizes output activations"
    return ""


def _torchao_problem(block: Mapping[str, Any]) -> str:
    kinds = block.get("quant_type")
    kind = kinds.get("default") if isinstance(kinds, dict) and len(kinds) == 1 else None
    if not isinstance(kind, dict) or kind.get("_type") not in _TORCHAO_TYPES:
        return f"quant_type is not one of {', '.join(_TORCHAO_TYPES)}"
    return ""


_PROBLEM = {
    Int8Format.BITSANDBYTES: _bitsandbytes_problem,
    Int8Format.COMPRESSED_TENSORS: _compressed_tensors_problem,
    Int8Format.TORCHAO: _torchao_problem,
}


def _difference(what: str, found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return f"a config group has no {what}"
    for key, value in wanted.items():
        if found.get(key) != value:
            return f"{key} of {what} is {_shown(found.get(key))}, expected {value!r}"
    return ""


def _shown(value: Any) -> str:
    return quoted(value, 40) if isinstance(value, str) else quoted(repr(value), 40)[1:-1]


def read_threshold(config: Mapping[str, Any], default: float) -> float:
    """The outlier threshold; `default` where the format has none."""
    threshold = config["quantization_config"].get("llm_int8_threshold")
    is_threshold = isinstance(threshold, int | float) and not isinstance(threshold, bool) and 0 <= threshold < 3e38
    return float(threshold) if is_threshold else default


def read_skipped_names(config: Mapping[str, Any], found: Int8Format) -> tuple[str, ...]:
    """The modules config.json tells the loader to leave alone, of those that are named and not described by a pattern.

    Without a list, loaders leave the output head alone.
    """
    names = config["quantization_config"].get(_SKIP_KEY[found])
    if not isinstance(names, list):
        return ("lm_head",)
    return tuple(name for name in names if isinstance(name, str) and _MODULE_NAME.fullmatch(name))


def loader_skip_list(block: Mapping[str, Any], key: str = _SKIP_KEY[Int8Format.BITSANDBYTES]) -> list[str] | None:
    """The names in a block's skip list, as transformers' loader takes them; None where it has none.

    transformers matches each as a regular expression. A stranger's may take for ever, so only plain names pass.

    Raises:
        SourceError: it is no list of at most MAX_SKIPPED names of modules.
    """
    names = block.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) > MAX_SKIPPED:
        found = f"{len(names):,} entries" if isinstance(names, list) else _shown(names)
        raise SourceError(
            f"{key} in config.json is {found}, expected a list of up to {MAX_SKIPPED:,} names of modules", _NAME_THEM
        )
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not _MODULE_NAME.fullmatch(name):
            raise SourceError(f"{key} in config.json holds {_shown(name)}, expected the name of a module", _NAME_THEM)
    return names


def skipping(names: list[str]) -> Callable[[str], bool]:
    """Whether the loader leaves a module alone, by the names of `loader_skip_list`.

    transformers' rule for plain names, with one expression in place of one for each: a name matches from the start of a
    module's name up to a dot or its end, or at its end.

    Source: transformers/quantizers/quantizers_utils.py, `should_convert_module`, version 5.24.
    """
    if not names:
        return lambda name: False
    beginning = re.compile(rf"(?:{'|'.join(names)})(?:(?<=\.)|(?=\.|$))")
    return lambda name: beginning.match(name) is not None or name.endswith(tuple(names))


_NAME_THEM = "name the modules in full: transformers would take this for a regular expression"


def is_ignored(module_name: str, module_class: type, block: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors block leaves a Linear module as it is.

    Entries of `ignore` and of a group's `targets` are module names, names of its class or of a base class, or regular
    expressions behind "re:", which match from the beginning of a name. Without targets, all are meant.

    Raises:
        SourceError: a pattern is none, or of a kind that cannot be matched in bounded time.
    """
    classes = {base.__name__ for base in module_class.__mro__}

    def is_named(entries: Any) -> bool:
        names = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        if module_name in names or not classes.isdisjoint(names):
            return True
        patterns = [f"^({name.removeprefix('re:')}).*" for name in names if name.startswith("re:")]
        return _first_match(tuple(patterns), module_name)

    groups = block.get("config_groups")
    targets = [group.get("targets") for group in groups.values()] if isinstance(groups, dict) else []
    return is_named(block.get("ignore")) or (bool(targets) and not any(map(is_named, targets)))


def is_ignored_by_name(module_name: str, block: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors block leaves a Linear module as it is, by plain names alone.

    For whoever judges a stranger's block: its expressions are not run, and count as naming nothing.
    """
    groups = block.get("config_groups")
    targets = [group.get("targets") for group in groups.values()] if isinstance(groups, dict) else []
    named = [entries if isinstance(entries, list) else [] for entries in targets]
    is_target = any(module_name in entries or "Linear" in entries for entries in named)
    ignored = block.get("ignore")
    is_listed = isinstance(ignored, list) and (module_name in ignored or "Linear" in ignored)
    return is_listed or (bool(named) and not is_target)


def _first_match(patterns: tuple[str, ...], module_name: str) -> bool:
    try:
        return TailPatterns(patterns).first_match(module_name) is not None
    except PatternRefusedError as error:
        raise SourceError(
            f"quantization_config names modules by a pattern that is not read: {quoted(str(error))}",
            "name them in full, or export the checkpoint with int8convert, which does",
        ) from error


def is_conv1d(module_name: str, config: Mapping[str, Any]) -> bool:
    """Whether a module is one of the Conv1D layers GPT-2 and its kin have for Linear: its weight is [in, out].

    Told by the model's type and the module's name, which transformers' own classes bear out. Does not know models whose
    code is not transformers'.
    """
    return module_name.rpartition(".")[2] in CONV1D_NAMES and not _CONV1D_MODEL_TYPES.isdisjoint(_model_types(config))


def _model_types(value: Any) -> Iterator[str]:
    """Of the model and of the models it is composed of."""
    if isinstance(value, dict):
        if isinstance(value.get("model_type"), str):
            yield value["model_type"]
        for part in value.values():
            yield from _model_types(part)
