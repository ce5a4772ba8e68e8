"""Reads from a PEFT LoRA adapter's adapter_config.json what decides how the adapter is merged.

PEFT can write more than `W + alpha / r * B @ A`, and more with every version. So an option that is unknown here must be
unset: to ignore one that matters would give wrong weights that load without an error.

Source: peft/tuners/lora/config.py and model.py of PEFT 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from int8convert.errors import AdapterError
from int8convert.formats.name_pattern import PatternRefusedError, TailPatterns
from int8convert.text import quoted

MERGE_WITH_PEFT = "merge the adapter with PEFT (merge_and_unload) and convert the merged checkpoint"

_WITHOUT_EFFECT = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
"""Options that are read below, matter in training alone, or repeat the tensors: a saved bias is merged whatever `bias`
says. `fan_in_fan_out` is here because PEFT uses the module's class where the two differ."""

_REASON_BY_OPTION = {
    "alora_invocation_tokens": "it acts on some tokens only, which no merged weight can do",
    "arrow_config": "it chooses among adapters for each token, which no merged weight can do",
    "kasa_config": "it needs the singular values of the whole base weight",
    "layer_replication": "the model has more layers than its checkpoint",
    "lora_bias": "it changes biases too",
    "megatron_config": "its tensors are laid out for Megatron",
    "monteclora_config": "its weights are drawn by chance",
    "target_parameters": "it changes parameters that are no module's weight, such as fused experts",
    "trainable_token_indices": "it changes single rows of the embedding",
    "use_bdlora": "its matrices are stored as blocks of a diagonal",
    "use_qalora": "it averages the inputs by groups",
    "velora_config": "it is a variant with tensors of its own",
}
_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The options that decide how an adapter is merged.

    Attributes:
        target_modules: names, or dotted tails of names, of the changed modules; None where a regular expression, a
            shorthand or PEFT's table of models selects them.
        modules_to_save: tails of the names of replaced modules.
        is_dora: each row is scaled to a stored length.
        task_type: PEFT's name of the task, such as SEQ_CLS, for a hint; "" if not stated.
    """

    rank: int
    alpha: float
    rank_by_pattern: Mapping[str, int] = field(repr=False)
    alpha_by_pattern: Mapping[str, float] = field(repr=False)
    target_modules: tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    is_rank_stabilized: bool
    is_dora: bool
    task_type: str
    _rank_patterns: TailPatterns = field(repr=False)
    _alpha_patterns: TailPatterns = field(repr=False)

    def rank_of(self, module_name: str) -> int:
        """Return the rank of a module's matrices."""
        pattern = self._rank_patterns.first_match(module_name)
        return self.rank if pattern is None else self.rank_by_pattern[pattern]

    def scaling_of(self, module_name: str) -> float:
        """Return the factor of B @ A: alpha / r, or alpha / sqrt(r)."""
        pattern = self._alpha_patterns.first_match(module_name)
        alpha = self.alpha if pattern is None else self.alpha_by_pattern[pattern]
        rank = self.rank_of(module_name)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def targets(self, module_name: str) -> bool:
        """Return whether `target_modules` selects a module. True where it holds no names."""
        return self.target_modules is None or any(
            module_name == target or module_name.endswith(f".{target}") for target in self.target_modules
        )


def parse_adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """Check an adapter_config.json that has been read.

    Raises:
        AdapterError: the adapter is not a LoRA, or of a variant that cannot be merged in blocks of rows.
    """
    _check_kind(config)
    _check_unset(config)
    rank_by_pattern = _pattern_table(config, "rank_pattern")
    alpha_by_pattern = _pattern_table(config, "alpha_pattern")
    targets = config.get("target_modules")
    return AdapterConfig(
        rank=_rank(config.get("r", 8), "r"),
        alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        rank_by_pattern={pattern: _rank(value, "rank_pattern") for pattern, value in rank_by_pattern.items()},
        alpha_by_pattern={pattern: _alpha(value, "alpha_pattern") for pattern, value in alpha_by_pattern.items()},
        target_modules=None if targets is None or isinstance(targets, str) else _names(config, "target_modules"),
        modules_to_save=_names(config, "modules_to_save"),
        is_rank_stabilized=_flag(config, "use_rslora"),
        is_dora=_flag(config, "use_dora"),
        task_type=task_type if isinstance(task_type := config.get("task_type"), str) else "",
        _rank_patterns=_compile(rank_by_pattern, "rank_pattern"),
        _alpha_patterns=_compile(alpha_by_pattern, "alpha_pattern"),
    )


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        shown = quoted(kind) if isinstance(kind, str) else "none"
        raise AdapterError(f"peft_type in adapter_config.json is {shown}, expected 'LORA'", MERGE_WITH_PEFT)
    init = config.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS_THAT_KEEP_THE_BASE):
        shown = quoted(init) if isinstance(init, str) else f"a {type(init).__name__}"
        raise AdapterError(
            f"init_lora_weights in adapter_config.json is {shown}: the adapter was trained on a changed base, "
            "not on the checkpoint's own",
            "save it from PEFT with path_initial_model_for_weight_conversion, which makes it a plain one",
        )


def _check_unset(config: Mapping[str, Any]) -> None:
    for option, value in config.items():
        if option in _WITHOUT_EFFECT or value is None or value is False or value in ({}, [], ""):
            continue
        reason = _REASON_BY_OPTION.get(option, "int8convert does not know what it changes")
        raise AdapterError(f"adapter_config.json sets {quoted(option)}: {reason}", MERGE_WITH_PEFT)


def _pattern_table(config: Mapping[str, Any], option: str) -> dict[str, Any]:
    table = config.get(option) or {}
    if not isinstance(table, dict):
        raise _wrong_value(option, table, "an object")
    return table


def _names(config: Mapping[str, Any], option: str) -> tuple[str, ...]:
    names = config.get(option) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _wrong_value(option, names, "a list of names")
    return tuple(names)


def _rank(value: Any, option: str) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise _wrong_value(option, value, "a number of at least 1")
    return value


def _alpha(value: Any, option: str) -> float:
    # Bounded far below what float32 holds, so that no scaling becomes infinite, nor an int too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        raise _wrong_value(option, value, "a finite number")
    return float(value)


def _flag(config: Mapping[str, Any], option: str) -> bool:
    value = config.get(option)
    if value is not None and not isinstance(value, bool):
        raise _wrong_value(option, value, "true or false")
    return value is True


def _wrong_value(option: str, value: Any, expected: str) -> AdapterError:
    # The digits of a huge int are not printed: that alone could take minutes.
    is_short = isinstance(value, str | float | bool) or (isinstance(value, int) and abs(value) < 1 << 63)
    shown = quoted(str(value), 40) if is_short else f"a {type(value).__name__}"
    return AdapterError(
        f"{option} in adapter_config.json is {shown}, expected {expected}",
        "fetch the adapter again, from a source you trust",
    )


def _compile(table: Mapping[str, Any], option: str) -> TailPatterns:
    try:
        return TailPatterns(table)
    except PatternRefusedError as refused:
        raise AdapterError(
            f"adapter_config.json has a pattern in {option} that int8convert does not match: {refused}",
            "write the names of the modules instead",
        ) from None
