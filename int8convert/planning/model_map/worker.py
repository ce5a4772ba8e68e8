"""The child process behind `ModelMapProcess`: transformers says what each tensor of a checkpoint is.

1. Build the model of config.json on the meta device (`model_build`).
2. Map each checkpoint key to the parameter transformers would load it into, by transformers' own renaming.
3. Choose what becomes int8: exactly the modules the format's loader will replace, given the skip list we write.
4. Give each other tensor the dtype a plain load would give it: the loader of int8 checkpoints takes them as stored.
5. Say which parameters the checkpoint does not give, and which tensors the model does not take (`model_needs`).

An exception that is not ours makes the parent fall back to the name rules, and its first line is the reason given.
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
from int8convert.planning.expert_layouts import ExpertLayout
from int8convert.planning.model_map.build import TORCH_DTYPE, build_model
from int8convert.planning.model_map.experts import CheckpointTensor, fused_layout, is_one_expert
from int8convert.planning.model_map.keys import LoadedInto, ModelKeys
from int8convert.planning.model_map.model_map import Action, ModuleFilter
from int8convert.planning.model_map.needs import find_needs
from int8convert.planning.name_rules import QUANTIZABLE_DTYPES
from int8convert.runtime.linear_subclasses import computes_as_linear
from int8convert.runtime.weight_reads import ReadKind, modules_with_read_weights
from int8convert.transformers_internals import (
    get_keys_to_not_convert,
    kept_in_fp32,
    parameter_dtypes,
    patched_modules,
    should_convert_module,
    tied_parameters,
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


_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""A gated MLP's gate is called gate_proj."""


class TensorChoice:
    """Decides on every tensor of one checkpoint for one model.

    Does not know values: a Linear weight full of NaN is chosen like any other.
    """

    def __init__(self, model: Any, dtype: torch.dtype, tensors: list[CheckpointTensor], modules: ModuleFilter) -> None:
        self.model = model
        self.dtype = dtype
        self.tensors = tensors
        self.modules = modules
        self.format = module_of(modules.output_format)
        self.keys = ModelKeys(model, [tensor.name for tensor in tensors], self.format.MOVED_TOGETHER)
        self.loaded = self.keys.loaded
        self._module_by_name = dict(model.named_modules())
        self._tied = tied_parameters(model)
        self._keep_in_fp32 = kept_in_fp32(model)
        self._default_skips = get_keys_to_not_convert(model) + self._keep_in_fp32

    @cached_property
    def replaceable(self) -> set[str]:
        """The modules the loader replaces unless told not to."""
        return {name for name, module in self._module_by_name.items() if self.format.replaces(module)}

    @cached_property
    def _routers(self) -> set[str]:
        """The modules that choose experts: a wrong choice costs more than a rounded weight, and they are small.

        bitsandbytes rounds those that are Linear, so its format does too. Servers of compressed-tensors expect none.
        """
        routers = {name for name, module in self._module_by_name.items() if type(module).__name__.endswith("Router")}
        if self.format.KEEPS_ROUTERS:
            routers |= {name for name in self._module_by_name if not _ROUTER_NAMES.isdisjoint(name.split("."))}
        return routers

    @cached_property
    def candidates(self) -> dict[str, str]:
        """Module name -> checkpoint key, of those that may become int8 as far as the model goes."""
        found = {}
        for tensor in self.tensors:
            into = self.loaded[tensor.name]
            if into is None or into.is_converted or not into.parameter.endswith(".weight"):
                continue
            module_name = into.parameter.removesuffix(".weight")
            if (
                module_name in self.replaceable
                and tensor.dtype in QUANTIZABLE_DTYPES
                and tensor.shape == tuple(self._module_by_name[module_name].weight.shape)
                and min(tensor.shape) > 0
                and should_convert_module(module_name, self._default_skips)
                and module_name not in self._routers
                and module_name not in self._read_by_code
                and computes_as_linear(self._module_by_name[module_name])
                and self.keys.int8_output_name(tensor.name, into.parameter) is not None
            ):
                found[module_name] = tensor.name
        return found

    @cached_property
    def _read_by_code(self) -> dict[str, ReadKind]:
        return modules_with_read_weights(self.model)

    @cached_property
    def chosen(self) -> set[str]:
        """The modules that become int8: the candidates the user allows, less those the written skip list would cover.

        A loader may read a skipped name also as a regular expression and as a tail of other names, so what it would
        replace is computed by its own rule, until list and choice agree.
        """
        chosen = {name for name in self.candidates if self.modules.allows(name)}
        while True:
            skips = [*(self.replaceable - chosen), *self._keep_in_fp32]
            covered = self.format.covered(chosen, skips)
            if not covered:
                return chosen
            chosen -= covered

    @cached_property
    def skip_modules(self) -> list[str]:
        kept = self.replaceable - self.chosen
        if self.format.KEEPS_ROUTERS:
            kept |= self._routers  # servers build a Linear where transformers has a class of its own
        return sorted(kept)

    @cached_property
    def experts(self) -> dict[str, ExpertLayout | None]:
        """Checkpoint key -> what a tensor of experts holds; None for an ordinary matrix of one expert."""
        found: dict[str, ExpertLayout | None] = {}
        for tensor in self.tensors:
            into = self.loaded[tensor.name]
            module = self._module_by_name.get(into.parameter.rpartition(".")[0]) if into is not None else None
            if into is None or module is None or tensor.dtype not in QUANTIZABLE_DTYPES:
                continue
            if is_one_expert(module, into, tensor):
                found[tensor.name] = None
            elif layout := fused_layout(module, into, tensor):
                found[tensor.name] = layout
        return found

    def _expert_module(self, key: str) -> str:
        """The name by which patterns choose among experts."""
        layout = self.experts[key]
        return f"{layout.module}.{layout.projections[0]}" if layout else key.removesuffix(".weight")

    @cached_property
    def chosen_experts(self) -> set[str]:
        """Checkpoint keys of the experts that become int8."""
        if not self.format.HOLDS_EXPERTS:
            return set()
        return {key for key in self.experts if self.modules.allows(self._expert_module(key))}

    @property
    def pattern_targets(self) -> list[str]:
        """The modules that patterns of the user's may match."""
        if not self.format.HOLDS_EXPERTS:
            return sorted(self.candidates)
        return sorted({*self.candidates, *map(self._expert_module, self.experts)})

    @property
    def parameters(self) -> dict[str, tuple[str, bool]]:
        """Parameter -> the checkpoint key it is loaded from as it is, or is tied to, and whether that is transposed."""
        found: dict[str, tuple[str, bool]] = {}
        for key, into in self.loaded.items():
            if into is not None and not into.is_converted:
                module = self._module_by_name.get(into.parameter.removesuffix(".weight"))
                found[into.parameter] = key, is_conv1d_layer(module)
        return {**{name: found[to] for name, to in self._tied.items() if to in found}, **found}

    def decide(self, tensor: CheckpointTensor) -> tuple[Action, str, str, str, dict[str, Any] | None]:
        """Action, reason, output name, output dtype of one tensor, and what it holds if it is split."""
        if tensor.name in self.chosen_experts:
            layout = self.experts[tensor.name]
            if layout is None:
                return Action.QUANTIZE, "", tensor.name, "I8", None
            return Action.SPLIT, "", "", "I8" if layout.leaf == "weight" else tensor.dtype, asdict(layout)
        return *self._decide_alone(tensor), None

    def _decide_alone(self, tensor: CheckpointTensor) -> tuple[Action, str, str, str]:
        into = self.loaded[tensor.name]
        if into is None:
            return Action.KEEP, f"not used by {type(self.model).__name__}", tensor.name, tensor.dtype
        output_name = self.keys.output_name(tensor.name, into.parameter) if not into.is_converted else tensor.name
        module_name, _, leaf = into.parameter.rpartition(".")
        if leaf == "weight" and module_name in self.chosen and not into.is_converted:
            is_conv1d = is_conv1d_layer(self._module_by_name[module_name])
            output_name = self.keys.int8_output_name(tensor.name, into.parameter) or output_name
            return Action.QUANTIZE_TRANSPOSED if is_conv1d else Action.QUANTIZE, "", output_name, "I8"
        dtype = self._output_dtype(tensor, into)
        if self._is_duplicate(tensor, into):
            return Action.DROP, f"tied to {self._tied[into.parameter]}", output_name, dtype
        return Action.KEEP, self._reason_to_keep(tensor, into, module_name, leaf), output_name, dtype

    @cached_property
    def _parameter_dtype(self) -> Callable[[str], torch.dtype]:
        """Parameter name -> the dtype a plain load gives it, some kept in fp32 whatever the model's dtype."""
        return parameter_dtypes(self.model, self.dtype)

    def _output_dtype(self, tensor: CheckpointTensor, into: LoadedInto) -> str:
        if tensor.dtype not in TORCH_DTYPE:
            return tensor.dtype
        return _STORED_DTYPE.get(self._parameter_dtype(into.parameter), tensor.dtype)

    @cached_property
    def _by_parameter(self) -> Mapping[str, CheckpointTensor]:
        return {into.parameter: tensor for tensor in self.tensors if (into := self.loaded[tensor.name]) is not None}

    def _is_duplicate(self, tensor: CheckpointTensor, into: LoadedInto) -> bool:
        """Whether the same stored bytes go into the parameter this one is tied to."""
        original = self._by_parameter.get(self._tied.get(into.parameter, ""))
        return (
            original is not None
            and original.name != tensor.name
            and original.place is not None
            and (original.place, original.shape) == (tensor.place, tensor.shape)
        )

    def _reason_to_keep(self, tensor: CheckpointTensor, into: LoadedInto, module_name: str, leaf: str) -> str:
        module = self._module_by_name.get(module_name)
        if tensor.name in self.experts:
            if self.format.HOLDS_EXPERTS:
                return "user skip"
            return f"experts: not replaced by the {self.modules.output_format} loader"
        is_tied = into.parameter in self._tied or into.parameter in self._tied.values()
        if isinstance(module, nn.Embedding):
            return "embedding, tied" if is_tied else "embedding"
        if module is None or leaf != "weight" or not (is_linear(module) or is_conv1d_layer(module)):
            if len(tensor.shape) == 3 and "expert" in into.parameter:
                return "experts in an unknown layout"
            if isinstance(module, nn.MultiheadAttention) and len(tensor.shape) == 2:
                return f"MultiheadAttention: not replaced by the {self.modules.output_format} loader"
            is_gate = len(tensor.shape) == 2 and module_name.rpartition(".")[2] in _ROUTER_NAMES
            return "router" if is_gate or module_name in self._routers else "not a matrix product"
        if module is self.model.get_output_embeddings():
            return "output head, tied" if is_tied else "output head"
        if is_tied:
            return "tied to another module"
        if not should_convert_module(module_name, self._keep_in_fp32):
            return "keep in fp32"
        if module_name in self._routers:
            return "router"
        if module_name not in self.replaceable:
            if is_conv1d_layer(module):
                return f"Conv1D: {self.modules.output_format} has no form for it"
            return f"{type(module).__name__}: not replaced by the {self.modules.output_format} loader"
        if into.is_converted:
            return "merged or split on loading"
        if module_name in self.candidates:
            return "user skip" if not self.modules.allows(module_name) else "covered by a skipped name"
        if tensor.dtype not in QUANTIZABLE_DTYPES or tensor.shape != tuple(module.weight.shape):
            return f"{tensor.dtype} {list(tensor.shape)} does not fit the model"
        if not computes_as_linear(module):
            return f"{type(module).__name__}: computes something else than a Linear"
        if module_name in self._read_by_code:
            return str(self._read_by_code[module_name])
        if self.keys.int8_output_name(tensor.name, into.parameter) is None:
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
    choice = TensorChoice(model, dtype, tensors, modules)
    return {
        "model_class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": {tensor.name: choice.decide(tensor) for tensor in tensors},
        "skip_modules": choice.skip_modules,
        "candidates": choice.pattern_targets,
        "parameters": choice.parameters,
        "notes": notes,
        "needs": asdict(find_needs(model, choice.keys, tensors)),  # last: it ties the model's weights
    }
