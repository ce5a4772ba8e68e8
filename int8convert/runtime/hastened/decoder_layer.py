"""Decoder layers of the common language models at the speed of memory, for one token of each sequence on a CPU.

Python and torch's operations between the products take longer than the products of a token. So `hasten_layers` gives a
layer two kernels that do all of its work. They know the classes of `layer_table.LAYERS`. Each layer computes one of its
first tokens both ways. If the results differ by more than rounding, as after a change in transformers, its own code is
used from then on.

Its own code is also used for several tokens of a sequence, under a mask of floats, while something records or
differentiates, and where hooks or adapters are inside the layer.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from cuda_kernels import ops
from cuda_kernels.cpu.decoder_layer import DTYPES, DecoderLayer
from cuda_kernels.cpu.team import ALONE, team
from int8convert.runtime.hastened.layer_table import LAYERS, Kept, Layout, describe

_MAX_TOKENS = 4
"""Largest number of sequences, each with one token. Beside the products of more, torch's operations cost little."""

_MAX_DIFFERENCE = 0.05
"""A larger `_difference` between the kernels and a layer's own code is more than rounding."""


def hasten_layers(model: nn.Module) -> None:
    """Give the decoder layers of a model that are known their kernels, but not those with another `forward`."""
    for module in model.modules():
        if _layout(type(module)) is not None and "forward" not in vars(module) and not hasattr(module, "_hf_hook"):
            module.__class__ = _fast_class(type(module))  # type: ignore[arg-type]


def restore_layers(model: nn.Module) -> None:
    """Undo `hasten_layers`."""
    for module in model.modules():
        if isinstance(module, _FastLayer):
            _KERNELS.pop(module, None)
            module.__class__ = module._plain  # type: ignore[assignment]


def _layout(cls: type) -> Layout | None:
    known = cls.__module__.startswith("transformers.models.") and not issubclass(cls, _FastLayer)
    return LAYERS.get(cls.__name__) if known else None


class _FastLayer(nn.Module):
    """What `_fast_class` adds to a class of layers."""

    _plain: type[nn.Module]
    self_attn: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        name = "cache" if "cache" in options else "past_key_values"  # the name before transformers 5.24
        cache = options.get(name)
        if args or cache is None or not _is_step(self, hidden_states, options):
            return super().forward(hidden_states, *args, **options)
        kernels = _kernels(self, hidden_states.dtype)
        layer = None if kernels is None else kernels.layer
        if kernels is None or layer is None or hidden_states.shape[2] != layer.hidden_size:
            return super().forward(hidden_states, *args, **options)
        angles = options.get("position_embeddings") if kernels.layout.is_rotated else None
        if kernels.layout.is_rotated and not _are_angles(angles, hidden_states, layer.head_size):
            return super().forward(hidden_states, *args, **options)
        mask = options.get("attention_mask")
        if not kernels.is_checked:
            record = _Record(cache)
            y = super().forward(hidden_states, **options | {name: record})
            kernels.check(layer, hidden_states, angles, record, mask, y)
            return y
        q, k, v = layer.queries_keys_values(hidden_states, angles)
        keys, values = cache.update(k, v, self.self_attn.layer_idx)
        return layer.attention_and_mlp(hidden_states, q, keys, values, mask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is of the plain class, which another process can import.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_empty, (self._plain,), *reduced[2:])


def _empty(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


@cache
def _fast_class(plain: type[nn.Module]) -> type[nn.Module]:
    names = {"_plain": plain, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return type(plain.__name__, (_FastLayer, plain), names)


def _is_step(layer: _FastLayer, x: torch.Tensor, options: dict[str, Any]) -> bool:
    """Return whether the layer gets one token of each sequence, and has to return nothing but its output."""
    return (
        x.dtype in DTYPES
        and x.dim() == 3
        and x.shape[1] == 1
        and 0 < x.shape[0] <= _MAX_TOKENS
        and x.is_contiguous()
        and _is_mask(options.get("attention_mask"))
        and not options.get("output_attentions")
        and layer.self_attn.config._attn_implementation == "sdpa"
        and not layer.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and ops.is_plain(x)
        and (torch.get_num_threads() == 1 or team(torch.get_num_threads()) != ALONE)
    )


def _is_mask(mask: Any) -> bool:
    """Return whether a mask is None, or bool [B or 1, 1, 1, S]."""
    return mask is None or (
        isinstance(mask, torch.Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1:3] == (1, 1)
        and mask.stride(3) == 1
    )


class _Record:
    """Passes a layer's keys and values on to a cache, and keeps the new ones and all of them."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.new: tuple[torch.Tensor, torch.Tensor] = ()  # type: ignore[assignment]
        self.all: tuple[torch.Tensor, torch.Tensor] = ()  # type: ignore[assignment]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.new, self.all = (keys, values), self._cache.update(keys, values, *args, **options)
        return self.all


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return how often each tensor was changed in place. A tensor of inference mode does not know it: 0."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class _Kernels:
    """The kernels of a layer with its present modules and tensors; `layer` is None if they do not know such a layer."""

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module], dtype: torch.dtype) -> None:
        layout = _layout(module._plain)  # type: ignore[arg-type]
        assert layout is not None
        self.layout = layout
        self.dtype = dtype
        self.is_checked = False
        held = [(entries, name, value) for entries in _entries([module, *parts]) for name, value in entries.items()]
        settings = [(vars(part), name) for part in parts for name in _SETTINGS]
        held += [(place, name, place.get(name)) for place, name in settings if name in place or name == "forward"]
        self._entries, self._names, self._values = zip(*held, strict=True)
        self._parts, self._types = parts, list(map(type, parts))
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._kept = Kept()
        self.layer = describe(module, layout, parts, dtype, self._kept)
        self._versions = _versions(self._kept.sources)

    def is_current(self) -> bool:
        """Return whether the modules, their tensors and their modes are still the same, and no hook was added."""
        if not all(map(operator.is_, map(dict.get, self._entries, self._names), self._values)):
            return False
        if list(map(type, self._parts)) != self._types or _versions(self._kept.sources) != self._versions:
            return False
        if any(self._hooks) and any(map(_is_hooked, self._parts)):
            return False
        return self.layer is None or self.layer.is_in_place()

    def check(self, layer: DecoderLayer, x: torch.Tensor, angles: Any, record: _Record, mask: Any, y: Any) -> None:
        """Compare the kernels with what the layer's own code returned and stored; give them up if they differ.

        A first position, or the only one, shows neither rotations nor scores, so the next token is compared then.
        """
        (own_k, own_v), (keys, values) = record.new, record.all
        is_telling = keys.shape[2] > 1 and (angles is None or bool(angles[1].any()))
        if not is_telling or not bool(torch.isfinite(y).all()):
            return
        q, k, v = layer.queries_keys_values(x, angles)
        self.is_checked = True
        is_known = all(each.shape[:2] == k.shape[:2] and each.dtype == x.dtype for each in (keys, values))
        if is_known:
            pairs = ((k, own_k, 0), (v, own_v, 0), (layer.attention_and_mlp(x, q, keys, values, mask), y, x))
            is_known = all(_difference(*pair) < _MAX_DIFFERENCE for pair in pairs)
        if not is_known:
            self.layer = None


def _are_angles(angles: Any, x: torch.Tensor, head_size: int) -> bool:
    """Return whether `angles` are cosine and sine, of one position for each sequence or for all."""
    sizes = ((1, 1, head_size), (x.shape[0], 1, head_size))
    return angles is not None and all(a.shape in sizes and a.dtype == x.dtype and a.is_contiguous() for a in angles)


def _difference(found: torch.Tensor, expected: torch.Tensor, x: Any) -> float:
    """Return the mean error, each relative to the mean of what the layer adds to x, and to the value's precision."""
    precision = torch.finfo(expected.dtype)
    change = (expected - x).float().abs().mean()
    unit = change + expected.abs().float() * precision.eps + precision.tiny
    return float(((found - expected).float().abs() / unit).mean())


_SETTINGS = ("forward", "mode", "threshold", "input_block", "scaling", "head_dim", "variance_epsilon", "eps")
"""Attributes of modules that decide what they compute."""

_CAPTURING = "transformers.utils.output_capturing"
"""Module of the hooks that record attentions. They stay after the first request. sdpa returns no attentions to them."""


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, other than those that record attentions."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(hook.__module__ != _CAPTURING for hook in hooks)


_KERNELS: WeakKeyDictionary[nn.Module, _Kernels] = WeakKeyDictionary()


def _kernels(module: nn.Module, dtype: torch.dtype) -> _Kernels | None:
    """Return the kernels of a layer, for what it holds now; None if something inside it has hooks."""
    found = _KERNELS.get(module)
    if found is None or found.dtype != dtype or not found.is_current():
        parts = list(module.modules())[1:]
        if any(_is_hooked(part) or "forward" in vars(part) for part in parts):
            return None
        found = _KERNELS[module] = _Kernels(module, parts, dtype)
    return found


def _entries(parts: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return the dictionaries that say what modules hold."""
    return [entries for part in parts for entries in (part._modules, part._parameters, part._buffers)]
