"""Finds which parameters a model gets from a checkpoint, by a load on the meta device.

1. Each checkpoint tensor, as a shape without values, goes to the parameter that `ModelKeys` names.
2. transformers' conversions merge and split the tensors.
3. The results are compared with the model's parameters and persistent buffers, by name and shape.
4. transformers' rules remove tied parameters, and those that a class declares it can do without.

Runs in the child process, last, because tying changes the model. Costs microseconds a tensor. Does not know values.

Source: transformers 5.24, `convert_and_load_state_dict_in_model` and `_finalize_model_loading`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from int8convert.planning.model_map.experts import CheckpointTensor
from int8convert.planning.model_map.keys import ModelKeys
from int8convert.planning.model_map.model_map import ModelNeeds, Shape
from int8convert.transformers_internals import (
    SkipParameters,
    WeightRenaming,
    dot_natural_key,
    finish_loading,
    mark_loaded,
    tied_parameters,
)

COUNTERS = ("position_ids", "num_batches_tracked")
"""Ends of the names of buffers that may lack: positions, and the number of batches seen in training."""


_SAYING_NOTHING = (*COUNTERS, "inv_freq")
_INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


@dataclass
class _Loading:
    """State of a load, with transformers' attribute names: its methods read and change it."""

    missing_keys: set[str]
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)
    conversion_errors: dict[str, str] = field(default_factory=dict)


def find_needs(model: Any, keys: ModelKeys, tensors: list[CheckpointTensor]) -> ModelNeeds:
    """Load a checkpoint's shapes into a model.

    Args:
        model: on the meta device; its weights are tied afterwards.
    """
    needed = model.state_dict()
    parameters = dict(model.named_parameters())
    n_parameters = sum(p.numel() for name, p in parameters.items() if name not in tied_parameters(model))
    integers = _integers(needed, keys, tensors)
    info = _Loading(set(needed))
    key_of: dict[str, str] = {}
    transforms = _collect(keys, tensors, info, key_of)
    for first, transform in transforms.items():
        try:
            arrived = transform.convert(first, model=model, config=model.config, hf_quantizer=None, loading_info=info)
        except SkipParameters:
            continue  # noted in info.conversion_errors
        for name, value in arrived.items():
            _arrive(model, needed, name, value[0] if isinstance(value, list) else value, info)
    missing_before = finish_loading(model, info)
    mismatched: dict[str, tuple[Shape | None, Shape]] = {
        name: (found, wanted) for name, found, wanted in sorted(info.mismatched_keys)
    }
    mismatched |= {name: (None, _shape(needed[name])) for name in sorted(info.conversion_errors)}
    missing = {name: _shape(needed[name]) for name in sorted(info.missing_keys, key=dot_natural_key)}
    return ModelNeeds(
        integers=integers,
        n_parameters=n_parameters,
        missing=missing,
        defaulted=tuple(
            name
            for name in sorted(missing_before - info.missing_keys, key=dot_natural_key)
            if not name.endswith(_SAYING_NOTHING) and name not in tied_parameters(model)
        ),
        counters=tuple(name for name in missing if name.endswith(COUNTERS)),
        unexpected=tuple(sorted({key_of.get(name, name) for name in info.unexpected_keys}, key=dot_natural_key)),
        mismatched=mismatched,
    )


def _collect(
    keys: ModelKeys, tensors: list[CheckpointTensor], info: _Loading, key_of: dict[str, str]
) -> dict[str, Any]:
    """Return parameter -> transformers' conversion that makes it, with its tensors added.

    Args:
        info: receives unexpected keys.
        key_of: receives their checkpoint keys.
    """
    transforms: dict[str, Any] = {}
    for tensor in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):
        into = keys.loaded[tensor.name]
        if into is None:
            for name in keys.unmatched[tensor.name]:
                info.unexpected_keys.add(name)
                key_of[name] = tensor.name
            continue
        transform = transforms.get(into.parameter)
        if transform is None:
            is_plain = into.converter is None
            transform = WeightRenaming(tensor.name, into.parameter) if is_plain else deepcopy(into.converter)
            transforms[into.parameter] = transform
        value = torch.empty(tensor.shape, device="meta")
        transform.add_tensor(into.parameter, tensor.name, into.pattern or tensor.name, value)
    return transforms


def _arrive(model: Any, needed: dict[str, Any], name: str, value: torch.Tensor, info: _Loading) -> None:
    info.missing_keys.discard(name)
    if name not in needed:
        info.unexpected_keys.add(name)  # as the bias of a split projection, in a model without biases
    elif not isinstance(needed[name], torch.Tensor):
        return  # extra state of a module, which has no shape
    elif value.shape != needed[name].shape:
        info.mismatched_keys.add((name, tuple(value.shape), tuple(needed[name].shape)))
    elif model.is_custom_code():  # such a class may hold one module under two names
        mark_loaded(model.get_parameter_or_buffer(name))


def _integers(needed: dict[str, Any], keys: ModelKeys, tensors: list[CheckpointTensor]) -> dict[str, str]:
    """Return the tensors of integers that go into float parameters, and their dtypes.

    A plain load casts them. Loaders of int8 checkpoints take them as stored, so the model would compute in integers.
    """
    found = {}
    for tensor in tensors:
        into = keys.loaded[tensor.name]
        if into is not None and tensor.dtype in _INTEGERS:
            parameter = needed.get(into.parameter)
            if isinstance(parameter, torch.Tensor) and parameter.is_floating_point():
                found[tensor.name] = tensor.dtype
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
