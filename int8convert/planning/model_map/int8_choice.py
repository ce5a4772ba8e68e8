"""Chooses what becomes int8: exactly the modules that the format's loader replaces, given the skip list we write."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from int8convert.formats.layers import is_conv1d_layer
from int8convert.formats.modules import module_of
from int8convert.planning.expert_layouts import ExpertLayout
from int8convert.planning.model_map.experts import CheckpointTensor, fused_layout, is_one_expert
from int8convert.planning.model_map.keys import ModelKeys
from int8convert.planning.model_map.model_map import ModuleFilter
from int8convert.planning.name_rules import QUANTIZABLE_DTYPES
from int8convert.runtime.linear_subclasses import computes_as_linear
from int8convert.runtime.weight_reads import ReadKind, modules_with_read_weights
from int8convert.transformers_internals import (
    get_keys_to_not_convert,
    kept_in_fp32,
    should_convert_module,
    tied_parameters,
)

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
"""Last parts of routers' names. A gated MLP's gate is called gate_proj."""


class Int8Choice:
    """Chooses the modules of one model, and the experts of one checkpoint, that become int8.

    Does not know values: a Linear weight full of NaN is chosen like any other.

    Attributes:
        loaded: checkpoint key -> the parameter it is loaded into.
        tied: tied parameter -> the parameter whose tensor it shares.
        keep_in_fp32: patterns of modules that stay float32.
    """

    def __init__(self, model: Any, tensors: list[CheckpointTensor], modules: ModuleFilter) -> None:
        self.model = model
        self.tensors = tensors
        self.modules = modules
        self.format = module_of(modules.output_format)
        self.keys = ModelKeys(model, [tensor.name for tensor in tensors], self.format.MOVED_TOGETHER)
        self.loaded = self.keys.loaded
        self.module_by_name = dict(model.named_modules())
        self.tied = tied_parameters(model)
        self.keep_in_fp32 = kept_in_fp32(model)
        self._default_skips = get_keys_to_not_convert(model) + self.keep_in_fp32

    @cached_property
    def replaceable(self) -> set[str]:
        """The modules that the loader replaces if the skip list does not name them."""
        return {name for name, module in self.module_by_name.items() if self.format.replaces(module)}

    @cached_property
    def routers(self) -> set[str]:
        """The modules that choose experts. They are small, and a wrong choice costs more than a rounded weight.

        bitsandbytes rounds those that are Linear, so its format does too. Servers of compressed-tensors expect none.
        """
        routers = {name for name, module in self.module_by_name.items() if type(module).__name__.endswith("Router")}
        if self.format.KEEPS_ROUTERS:
            routers |= {name for name in self.module_by_name if not ROUTER_NAMES.isdisjoint(name.split("."))}
        return routers

    @cached_property
    def candidates(self) -> dict[str, str]:
        """Module name -> checkpoint key, for the modules that the model allows to become int8."""
        found = {}
        for tensor in self.tensors:
            into = self.loaded[tensor.name]
            if into is None or into.is_converted or not into.parameter.endswith(".weight"):
                continue
            module_name = into.parameter.removesuffix(".weight")
            if (
                module_name in self.replaceable
                and tensor.dtype in QUANTIZABLE_DTYPES
                and tensor.shape == tuple(self.module_by_name[module_name].weight.shape)
                and min(tensor.shape) > 0
                and should_convert_module(module_name, self._default_skips)
                and module_name not in self.routers
                and module_name not in self.read_by_code
                and computes_as_linear(self.module_by_name[module_name])
                and self.keys.int8_output_name(tensor.name, into.parameter) is not None
            ):
                found[module_name] = tensor.name
        return found

    @cached_property
    def read_by_code(self) -> dict[str, ReadKind]:
        return modules_with_read_weights(self.model)

    @cached_property
    def chosen(self) -> set[str]:
        """The modules that become int8: the candidates that the user allows, without those that the skip list covers.

        A loader may read a skipped name also as a regular expression and as a tail of other names. So its own rule
        computes what the list covers, until list and choice agree.
        """
        chosen = {name for name in self.candidates if self.modules.allows(name)}
        while True:
            skips = [*(self.replaceable - chosen), *self.keep_in_fp32]
            covered = self.format.covered(chosen, skips)
            if not covered:
                return chosen
            chosen -= covered

    @cached_property
    def skip_modules(self) -> list[str]:
        kept = self.replaceable - self.chosen
        if self.format.KEEPS_ROUTERS:
            kept |= self.routers  # servers build a Linear where transformers has a class of its own
        return sorted(kept)

    @cached_property
    def experts(self) -> dict[str, ExpertLayout | None]:
        """Checkpoint key -> layout of a tensor of experts; None for an ordinary matrix of one expert."""
        found: dict[str, ExpertLayout | None] = {}
        for tensor in self.tensors:
            into = self.loaded[tensor.name]
            module = self.module_by_name.get(into.parameter.rpartition(".")[0]) if into is not None else None
            if into is None or module is None or tensor.dtype not in QUANTIZABLE_DTYPES:
                continue
            if is_one_expert(module, into, tensor):
                found[tensor.name] = None
            elif layout := fused_layout(module, into, tensor):
                found[tensor.name] = layout
        return found

    def _expert_module(self, key: str) -> str:
        """Return the name that patterns match for a tensor of experts."""
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
        """The modules that the user's patterns may match."""
        if not self.format.HOLDS_EXPERTS:
            return sorted(self.candidates)
        return sorted({*self.candidates, *map(self._expert_module, self.experts)})

    @property
    def parameters(self) -> dict[str, tuple[str, bool]]:
        """Parameter -> its checkpoint key, or that of its tied parameter, and whether that is stored [in, out]."""
        found: dict[str, tuple[str, bool]] = {}
        for key, into in self.loaded.items():
            if into is not None and not into.is_converted:
                module = self.module_by_name.get(into.parameter.removesuffix(".weight"))
                found[into.parameter] = key, is_conv1d_layer(module)
        return {**{name: found[to] for name, to in self.tied.items() if to in found}, **found}

    @property
    def uncounted(self) -> list[str]:
        """Checkpoint keys that are loaded into no parameter, or into a tied one: no part of the parameter count."""
        counted = dict(self.model.named_parameters()).keys() - self.tied.keys()
        return [key for key, into in self.loaded.items() if into is None or into.parameter not in counted]
