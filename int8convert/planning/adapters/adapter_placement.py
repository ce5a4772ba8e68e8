"""Finds the checkpoint's tensor for each change of a LoRA adapter, or refuses an adapter made for another model.

Left out: adapters on tied weights, because merging would change both uses, which the adapter was not trained for; and
tensors that transformers makes from several of the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import AdapterError
from int8convert.planning.adapters.adapter import Adapter
from int8convert.planning.adapters.lora import LoraDelta
from int8convert.text import quoted

_CLASS_BY_TASK = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's `task_type` -> the class whose head such an adapter holds."""

_OTHER_MODEL = "give the adapter with the model it was trained on"


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """A tensor of the checkpoint that an adapter may change.

    Attributes:
        is_transposed: stored [in, out], as by Conv1D. The module's class decides: of a square weight, neither the shape
            nor the adapter's `fan_in_fan_out` is reliable.
    """

    name: str
    shape: tuple[int, ...]
    is_transposed: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPlacement:
    """An adapter's changes by the checkpoint's keys.

    Attributes:
        deltas: key -> what is added to the tensor.
        replacements: key -> the tensor of `adapter.shard` that is read in its place, before any delta is added. Its
            dtype is the adapter's; PEFT rounds it to the model's.
    """

    adapter: Adapter
    deltas: Mapping[str, LoraDelta] = field(repr=False)
    replacements: Mapping[str, StoredTensor] = field(repr=False)


def place_adapter(adapter: Adapter, parameters: Mapping[str, BaseTensor]) -> AdapterPlacement:
    """Find the checkpoint's tensor for each change of an adapter.

    Args:
        parameters: parameter of the model -> the checkpoint's tensor that it is loaded from, without parameters made
            from several tensors. Tied parameters have one tensor. An adapter may also use the checkpoint's name of a
            module, which differs where transformers renamed a model or fused its experts later.

    Raises:
        AdapterError: the adapter is for another model, or changes what is tied.
    """
    by_key = {tensor.name: tensor for tensor in parameters.values()}
    wanted = [*(f"{module}.weight" for module in adapter.updates), *adapter.replacements]
    found = {name: base for name in wanted if (base := parameters.get(name) or by_key.get(name)) is not None}
    _check_all_found(adapter, wanted, found, list(by_key))
    _check_saved_modules(adapter, parameters, found)
    _check_untied(parameters, found)
    deltas: dict[str, LoraDelta] = {}
    for module, update in adapter.updates.items():
        base = found[f"{module}.weight"]
        _check_new(base.name, deltas)
        _check_shape(f"{module}.weight", update.shape[::-1] if base.is_transposed else update.shape, base)
        deltas[base.name] = LoraDelta(update, adapter.shard, base.is_transposed)
    replacements: dict[str, StoredTensor] = {}
    for parameter, replacement in adapter.replacements.items():
        base = found[parameter]
        _check_new(base.name, replacements)
        _check_shape(parameter, replacement.shape, base)
        replacements[base.name] = replacement
    return AdapterPlacement(adapter, deltas, replacements)


def _check_all_found(adapter: Adapter, wanted: list[str], found: Mapping[str, BaseTensor], keys: list[str]) -> None:
    lost = [name for name in wanted if name not in found]
    if lost and found and all(name in adapter.replacements for name in lost):
        model_class = _CLASS_BY_TASK.get(adapter.config.task_type, "the class it was trained with")
        raise AdapterError(
            f"the adapter {quoted(adapter.label)} has a head of its own, {_some(lost)}, which the checkpoint has no "
            "place for",
            f"load the checkpoint as {model_class}, merge the adapter with PEFT (merge_and_unload), and convert what "
            "save_pretrained then writes",
        )
    if lost:
        raise AdapterError(
            f"{len(lost):,} of {len(wanted):,} tensors the adapter {quoted(adapter.label)} changes are not in the "
            f"checkpoint: {_some(lost)}; the checkpoint has {_some(keys)}",
            _OTHER_MODEL,
        )


def _check_saved_modules(adapter: Adapter, parameters: Mapping[str, BaseTensor], found: Iterable[str]) -> None:
    """Require every parameter of the modules in `modules_to_save`; else a trained one would be left out."""
    tails = adapter.config.modules_to_save
    have = set(found)
    for parameter in parameters:
        modules = parameter.split(".")[:-1]
        names = [".".join(modules[: i + 1]) for i in range(len(modules))]
        if parameter not in have and any(name.endswith(tails) for name in names):
            raise AdapterError(
                f"the adapter's modules_to_save cover {quoted(parameter)}, which its weight file does not hold",
                "fetch both files again",
            )


def _check_untied(parameters: Mapping[str, BaseTensor], found: Mapping[str, BaseTensor]) -> None:
    parameters_by_key: dict[str, list[str]] = {}
    for parameter, base in parameters.items():
        parameters_by_key.setdefault(base.name, []).append(parameter)
    for name, base in found.items():
        tied = parameters_by_key[base.name]
        if len(tied) > 1:
            raise AdapterError(
                f"the adapter changes {quoted(name)}, which is tied: {_some(tied)} are one tensor, and merging would "
                "change all of them",
                "untie the base model first: tie_word_embeddings=False and a copy of the weight",
            )


def _check_new(key: str, placed: Mapping[str, object]) -> None:
    if key in placed:
        raise AdapterError(
            f"the adapter changes the tensor {quoted(key)} twice, by two names of its module", _OTHER_MODEL
        )


def _check_shape(parameter: str, shape: tuple[int, ...], base: BaseTensor) -> None:
    if shape != base.shape:
        raise AdapterError(
            f"the adapter's {quoted(parameter)} has shape {list(shape)}, the checkpoint's has {list(base.shape)}",
            "give the model it was trained on, with the same vocabulary",
        )


def _some(names: list[str]) -> str:
    return ", ".join(quoted(name) for name in names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
