"""The worker of `ModelMapProcess`: maps the tensors of a checkpoint by its model's class in transformers.

1. Build the model of config.json on the meta device (`build`).
2. Map each checkpoint key to the parameter that transformers loads it into (`keys`).
3. Choose what becomes int8 (`int8_choice`).
4. Give each other tensor the dtype of a plain load, because the loader of int8 checkpoints takes it as stored.
5. Find the parameters that the checkpoint lacks, and the tensors that the model does not use (`needs`).

After an exception that is not ours the parent uses the name rules, and shows its first line as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from int8convert.errors import ModelMapError
from int8convert.formats.format import Format
from int8convert.formats.layers import is_conv1d_layer, is_linear
from int8convert.formats.modules import module_of
from int8convert.planning.model_map.build import TORCH_DTYPE, build_model
from int8convert.planning.model_map.experts import CheckpointTensor
from int8convert.planning.model_map.int8_choice import ROUTER_NAMES, Int8Choice
from int8convert.planning.model_map.keys import LoadedInto
from int8convert.planning.model_map.model_map import Action, ModuleFilter
from int8convert.planning.model_map.needs import find_needs
from int8convert.planning.name_rules import QUANTIZABLE_DTYPES
from int8convert.runtime.linear_subclasses import computes_as_linear
from int8convert.transformers_internals import (
    parameter_dtypes,
    patched_modules,
    should_convert_module,
)

_STORED_DTYPE = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def check_loadable(model: Any, output_format: Format) -> None:
    """Raise a ModelMapError if transformers' int8 loader puts modules of other weights into a model."""
    for name, new_class in patched_modules(model, output_format).items():
        raise ModelMapError(
            f"transformers {transformers.__version__} loads no int8 checkpoint of {type(model).__name__}: "
            f"it makes {name} a {new_class}, for which the checkpoint has no weights",
            "pass --format compressed-tensors, which has a form for it",
        )


class TensorDecisions:
    """The decision on each tensor of a checkpoint, by the choice of what becomes int8.

    Args:
        dtype: the dtype in which a plain load holds the model.
    """

    def __init__(self, choice: Int8Choice, dtype: torch.dtype) -> None:
        self._choice = choice
        self._dtype = dtype

    def decide(self, tensor: CheckpointTensor) -> tuple[Action, str, str, str, dict[str, Any] | None]:
        """Return a tensor's action, reason, output name and output dtype, and its layout if it is split."""
        if tensor.name in self._choice.chosen_experts:
            layout = self._choice.experts[tensor.name]
            if layout is None:
                return Action.QUANTIZE, "", tensor.name, "I8", None
            return Action.SPLIT, "", "", "I8" if layout.leaf == "weight" else tensor.dtype, asdict(layout)
        return *self._decide_alone(tensor), None

    def _decide_alone(self, tensor: CheckpointTensor) -> tuple[Action, str, str, str]:
        choice = self._choice
        into = choice.loaded[tensor.name]
        if into is None:
            return Action.KEEP, f"not used by {type(choice.model).__name__}", tensor.name, tensor.dtype
        output_name = choice.keys.output_name(tensor.name, into.parameter) if not into.is_converted else tensor.name
        module_name, _, leaf = into.parameter.rpartition(".")
        if leaf == "weight" and module_name in choice.chosen and not into.is_converted:
            is_conv1d = is_conv1d_layer(choice.module_by_name[module_name])
            output_name = choice.keys.int8_output_name(tensor.name, into.parameter) or output_name
            return Action.QUANTIZE_TRANSPOSED if is_conv1d else Action.QUANTIZE, "", output_name, "I8"
        dtype = self._output_dtype(tensor, into)
        if self._is_duplicate(tensor, into):
            return Action.DROP, f"tied to {choice.tied[into.parameter]}", output_name, dtype
        return Action.KEEP, self._reason_to_keep(tensor, into, module_name, leaf), output_name, dtype

    @cached_property
    def _parameter_dtype(self) -> Callable[[str], torch.dtype]:
        """Parameter name -> the dtype that a plain load gives it; some stay float32 whatever the model's dtype."""
        return parameter_dtypes(self._choice.model, self._dtype)

    def _output_dtype(self, tensor: CheckpointTensor, into: LoadedInto) -> str:
        if tensor.dtype not in TORCH_DTYPE:
            return tensor.dtype
        return _STORED_DTYPE.get(self._parameter_dtype(into.parameter), tensor.dtype)

    @cached_property
    def _by_parameter(self) -> Mapping[str, CheckpointTensor]:
        return {
            into.parameter: tensor
            for tensor in self._choice.tensors
            if (into := self._choice.loaded[tensor.name]) is not None
        }

    def _is_duplicate(self, tensor: CheckpointTensor, into: LoadedInto) -> bool:
        """Return whether the same stored bytes go into the parameter that this one is tied to."""
        original = self._by_parameter.get(self._choice.tied.get(into.parameter, ""))
        return (
            original is not None
            and original.name != tensor.name
            and original.place is not None
            and (original.place, original.shape) == (tensor.place, tensor.shape)
        )

    def _reason_to_keep(self, tensor: CheckpointTensor, into: LoadedInto, module_name: str, leaf: str) -> str:
        choice = self._choice
        module = choice.module_by_name.get(module_name)
        if tensor.name in choice.experts:
            if choice.format.HOLDS_EXPERTS:
                return "user skip"
            return f"experts: not replaced by the {choice.modules.output_format} loader"
        is_tied = into.parameter in choice.tied or into.parameter in choice.tied.values()
        if isinstance(module, nn.Embedding):
            return "embedding, tied" if is_tied else "embedding"
        if module is None or leaf != "weight" or not (is_linear(module) or is_conv1d_layer(module)):
            if len(tensor.shape) == 3 and "expert" in into.parameter:
                return "experts in an unknown layout"
            if isinstance(module, nn.MultiheadAttention) and len(tensor.shape) == 2:
                return f"MultiheadAttention: not replaced by the {choice.modules.output_format} loader"
            is_gate = len(tensor.shape) == 2 and module_name.rpartition(".")[2] in ROUTER_NAMES
            return "router" if is_gate or module_name in choice.routers else "not a matrix product"
        if module is choice.model.get_output_embeddings():
            return "output head, tied" if is_tied else "output head"
        if is_tied:
            return "tied to another module"
        if not should_convert_module(module_name, choice.keep_in_fp32):
            return "keep in fp32"
        if module_name in choice.routers:
            return "router"
        if module_name not in choice.replaceable:
            if is_conv1d_layer(module):
                return f"Conv1D: {choice.modules.output_format} has no form for it"
            return f"{type(module).__name__}: not replaced by the {choice.modules.output_format} loader"
        if into.is_converted:
            return "merged or split on loading"
        if module_name in choice.candidates:
            return "user skip" if not choice.modules.allows(module_name) else "covered by a skipped name"
        if tensor.dtype not in QUANTIZABLE_DTYPES or tensor.shape != tuple(module.weight.shape):
            return f"{tensor.dtype} {list(tensor.shape)} does not fit the model"
        if not computes_as_linear(module):
            return f"{type(module).__name__}: computes something else than a Linear"
        if module_name in choice.read_by_code:
            return str(choice.read_by_code[module_name])
        if choice.keys.int8_output_name(tensor.name, into.parameter) is None:
            return "renamed on loading, its scale is not"
        return "last module of the model"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the map that `process.worker_request` asks for, as `process.parse_worker_answer` reads it."""
    tensors = [CheckpointTensor(name, dtype, tuple(shape), place) for name, dtype, shape, place in request["tensors"]]
    model, dtype, notes = build_model(request["directory"], tensors, request["trusts_code"], request["dtype"])
    output_format = Format(request["output_format"])
    if not module_of(output_format).HOLDS_EXPERTS:
        check_loadable(model, output_format)
    modules = ModuleFilter(tuple(request["skip"]), tuple(request["only"]), output_format)
    choice = Int8Choice(model, tensors, modules)
    decisions = TensorDecisions(choice, dtype)
    return {
        "model_class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": {tensor.name: decisions.decide(tensor) for tensor in tensors},
        "skip_modules": choice.skip_modules,
        "candidates": choice.pattern_targets,
        "parameters": choice.parameters,
        "notes": notes,
        "uncounted": choice.uncounted,
        "needs": asdict(find_needs(model, choice.keys, tensors)),  # last: it ties the model's weights
    }
