"""Int8 experts of a mixture-of-experts model: each projection of each expert is a layer.

transformers holds all experts of a layer in one tensor. Int8 checkpoints hold them one by one,
`experts.7.down_proj.weight`, and so does this module. Loading converts nothing, offloading moves one expert, and saving
writes the same files.

1. The tokens are sorted by expert, once; an unused expert costs nothing.
2. Each expert's tokens pass its gate and up projections, the model's activation, and its down projection.
3. The results are weighted and added to the tokens' outputs.

Left out: expert layers that work in another way than those of transformers 5. They are not replaced, and loading their
int8 weights ends in an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8convert.formats.format import Format
from int8convert.runtime.linear import Int8Linear
from int8convert.runtime.modes import OutlierMode
from int8convert.transformers_internals import (
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)

_ONE_EXPERT = re.compile(r"(.*)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """The form of the experts in a module of transformers.

    Attributes:
        projections: name -> (in_features, out_features), in the order of the data; two if there is no gate.
        has_bias: each projection has a bias.
        is_interleaved: the model's activation takes outputs of gate and up in turns.
        sees_all_tokens: each expert is given all tokens, those of others as zeros.
    """

    n_experts: int
    projections: dict[str, tuple[int, int]]
    has_bias: bool = False
    is_interleaved: bool = False
    sees_all_tokens: bool = False


def experts_form(module: Any) -> ExpertsForm | None:
    """Return the form of a module's experts; None if it holds none, or in an unknown form."""
    class_name = type(module).__name__
    if class_name == "DbrxExperts":
        sizes = _projections(module.hidden_size, module.ffn_hidden_size, has_gate=True)
        return ExpertsForm(module.num_experts, sizes)
    if class_name == "Llama4TextExperts":
        sizes = _projections(module.hidden_size, module.expert_dim, has_gate=True)
        return ExpertsForm(module.num_experts, sizes, sees_all_tokens=True)
    down = getattr(module, "down_proj", None)
    is_usual = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    if not is_usual or not isinstance(down, nn.Parameter) or down.dim() != 3 or module.has_post_expert_norm:
        return None
    hidden, intermediate = (down.shape[2], down.shape[1]) if module.is_transposed else down.shape[1:]
    return ExpertsForm(
        down.shape[0],
        _projections(hidden, intermediate, module.has_gate),
        module.has_bias,
        not module.is_concatenated,
    )


def _projections(hidden: int, intermediate: int, has_gate: bool) -> dict[str, tuple[int, int]]:
    first = {"gate_proj": (hidden, intermediate)} if has_gate else {}
    return {**first, "up_proj": (hidden, intermediate), "down_proj": (intermediate, hidden)}


def experts_in(model: Any, tensor_names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the modules whose experts are int8 in a checkpoint: name -> its names of projections, {"up_proj": "w3"}.

    The scales among its tensors and transformers' renaming, which merges experts, decide.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    patterns = {pattern: converter.source_patterns for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    found: dict[str, dict[str, str]] = {}
    for name in tensor_names:
        path = name.removesuffix(".weight_scale")
        if path == name:
            continue
        key, pattern = rename_source_key(f"{path}.weight", renamings, converters, model.base_model_prefix, parameters)
        if pattern is None:
            match = _ONE_EXPERT.fullmatch(key)
            if match:
                found.setdefault(match[1], {})[match[2]] = match[2]
        else:
            module_name, _, projection = key.rpartition(".")
            if projection == "gate_up_proj":
                projection = ("gate_proj", "up_proj")[patterns[pattern].index(pattern)]
            found.setdefault(module_name, {})[projection] = path.rpartition(".")[2]
    return found


class Int8Experts(nn.Module):
    """Replaces the module that holds all experts of a layer. Children 0, 1, ... are the experts.

    Args:
        experts: that module, on the meta device; kept for its activation, without its parameters.
        names: the checkpoint's names of their projections.
        mode, threshold: for each layer, see `int8convert.runtime.modes`.
    """

    def __init__(
        self, experts: Any, form: ExpertsForm, names: dict[str, str], mode: OutlierMode, threshold: float
    ) -> None:
        super().__init__()
        self.form = form
        self.names = names
        dtype = next(experts.parameters()).dtype
        for i in range(form.n_experts):
            expert = nn.Module()
            for name, (n_in, n_out) in form.projections.items():
                layout = Format.COMPRESSED_TENSORS
                layer = Int8Linear(
                    n_in, n_out, form.has_bias, "meta", dtype, layout=layout, mode=mode, threshold=threshold
                )
                expert.add_module(names[name], layer)
            self.add_module(str(i), expert)
        for module in experts.modules():
            module._parameters.clear()
        self._original = (experts,)  # in a tuple, lest it count as a part of the model, whose weights want initializing

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """Compute the experts' output for hidden_states [tokens, hidden].

        `routing` is each token's chosen experts and their weights, both [tokens, top_k]. Without it, each expert sees
        all tokens: hidden_states are [experts * tokens, hidden].
        """
        if self.form.sees_all_tokens:
            return self._run_on_all(hidden_states)
        top_k_index, top_k_weights = (*routing, *named.values())
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = torch.zeros_like(tokens)
        for expert, chosen in self._by_expert(top_k_index):
            token = chosen // top_k_index.shape[-1]
            weight = top_k_weights.reshape(-1)[chosen, None]
            y.index_add_(0, token, (self._run(expert, tokens[token]) * weight).to(y.dtype))
        return y.view_as(hidden_states)

    def _by_expert(self, top_k_index: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the chosen experts, each with its places in `top_k_index`."""
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        experts, counts = flat.unique(return_counts=True)
        for expert, places in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
            if expert < self.form.n_experts:  # some routers name one more for "none"
                yield expert, places

    def _run_on_all(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.view(self.form.n_experts, -1, hidden_states.shape[-1])
        y = torch.zeros_like(x)
        chosen = x.ne(0).any(-1)  # without biases, what is zero stays zero
        for expert in chosen.any(-1).nonzero().flatten().tolist():
            y[expert, chosen[expert]] = self._run(expert, x[expert, chosen[expert]])
        return y.view_as(hidden_states)

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        layers = self.get_submodule(str(expert))
        projections = {name: layers.get_submodule(own) for name, own in self.names.items()}
        up = projections["up_proj"](x)
        gate = projections["gate_proj"](x) if "gate_proj" in projections else None
        y: torch.Tensor = projections["down_proj"](self._activate(gate, up))
        return y

    def _activate(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        (experts,) = self._original
        y: torch.Tensor
        if gate is None:
            y = experts.act_fn(up)
        elif hasattr(experts, "_apply_gate"):
            by_turns = self.form.is_interleaved
            y = experts._apply_gate(torch.stack((gate, up), -1).flatten(-2) if by_turns else torch.cat((gate, up), -1))
        else:
            activation = getattr(experts, "act_fn", None) or experts.mlp.activation_fn
            y = activation(gate) * up
        return y
