"""Finds the weights of a model that a rotation changes together, by running it.

- Residual stream: a rotation of it goes into the embeddings and into the outputs of all layers that add to it, and out
  again at the inputs of all layers that read it through a norm. The norm's gain has to go into these layers first.
- Values: a rotation of a head's values goes into the outputs of the value layer, and out again at the inputs of the
  layer that reads the attention's result. Layers of a gated MLP look alike at first, and only the proof tells.

What a module reads is told by the tensor that it gets; what a value layer feeds, by a multiple of its output. That is a
proposal and no proof: see `proof`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8convert.formats.layers import features_of

_SCALE = 1024
"""Factor of a layer's output by which its pair is found: so large that a clamp after the layer shows."""

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class NormGroup:
    """A norm that reads the residual stream, and the layers that read its output.

    Attributes:
        offset: what the norm adds to its weight; see `fold.Gain`.
    """

    norm: str
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one model, by the names of its modules.

    Attributes:
        embeddings: embeddings that begin the residual stream.
        writers: layers that add their output to it.
        pairs: a layer and the one whose input is proportional to its output: the layer of an attention's values and
            that of its output; the two of an MLP whose activation keeps the proportion.
        other_readers: modules that read a norm's output, too, and are no Linear layers.
    """

    embeddings: tuple[str, ...]
    norms: tuple[NormGroup, ...]
    writers: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    other_readers: tuple[str, ...] = ()


def sizes_of(model: Any, layer: str) -> tuple[int, int]:
    """Return how many features a layer of a model reads and writes."""
    features = features_of(model.get_submodule(layer))
    assert features is not None, f"{layer} is no Linear layer"
    return features


def hidden_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def find_groups(model: Any, ids: torch.Tensor) -> Groups:
    """Run a small model on token ids [1, tokens], and return its groups."""
    size = hidden_size(model)
    layers = {name: features for name, module in model.named_modules() if (features := features_of(module))}
    norms = {name: module for name, module in model.named_modules() if _is_norm(module, size)}
    read, written = _trace(model, ids)
    groups = []
    for name, norm in norms.items():
        readers = tuple(n for n in layers if name in written and read.get(n) == written[name])
        offset = _offset(norm, size) if readers else None
        if offset is not None:
            groups.append(NormGroup(name, offset, readers))
    fed = {reader for group in groups for reader in group.readers}
    writers = tuple(n for n, (_, n_out) in layers.items() if n not in fed and n in read and n_out == size)
    embeddings = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name in written and module.weight.shape[1] == size
    )
    outputs = {written[name] for name in norms if name in written}
    others = tuple(name for name, memory in read.items() if memory in outputs and name not in {*layers, *norms})
    return Groups(embeddings, tuple(groups), writers, tuple(_find_pairs(model, ids, fed, writers)), others)


def _is_norm(module: Any, size: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (size,) and not list(module.children())


def _offset(norm: Any, size: int) -> float | None:
    """Return 0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight, else None."""
    weight = norm.weight.detach().clone()
    x = torch.randn(1, 4, size, generator=torch.Generator().manual_seed(0))
    try:
        for offset in (0.0, 1.0):
            norm.weight.data.fill_(-offset)
            with torch.no_grad():
                y = norm(x)
            if torch.equal(y, y[:, :1].expand_as(y)):  # nothing of x is left
                return offset
        return None
    finally:
        norm.weight.data.copy_(weight)


def _trace(model: Any, ids: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Return module -> the memory of its first input, and of its output, for modules with weights of their own."""
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    alive: list[torch.Tensor] = []  # so that no memory is used twice

    def after(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
            first = next((x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)), None)
            for place, tensor in ((read, first), (written, y)):
                if isinstance(tensor, torch.Tensor):
                    alive.append(tensor)
                    place[name] = tensor.untyped_storage().data_ptr()

        return hook

    hooks = [
        module.register_forward_hook(after(name), with_kwargs=True)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        run(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return read, written


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what the model predicts, or its last hidden state, float32 [1, tokens, ...]."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False)[0]
    return found


def _find_pairs(model: Any, ids: torch.Tensor, fed: set[str], writers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the pairs in which a multiple of the first layer's output is that multiple of the second layer's input."""
    modules = dict(model.named_modules())
    plain = _inputs_of(model, ids, writers)
    for name in sorted(fed):
        with _multiplying(modules[name]):
            found = _inputs_of(model, ids, writers)
        # What runs later reads another residual stream: so the first writer that changes is the one that is fed.
        changed = [writer for writer, x in found.items() if not torch.equal(x, plain[writer])]
        if changed and torch.allclose(found[changed[0]] / _SCALE, plain[changed[0]], rtol=1e-4, atol=1e-5):
            yield name, changed[0]


def _inputs_of(model: Any, ids: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the inputs of modules, in the order in which they run."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name in names:

        def before(_module: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            found[name] = inputs[0].detach().clone()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(before))
    try:
        run(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _multiplying(module: Any) -> Iterator[None]:
    hook = module.register_forward_hook(lambda _module, _inputs, y: _SCALE * y)
    try:
        yield
    finally:
        hook.remove()


def pattern(name: str) -> str:
    """Return a module's name with its numbers replaced: the same for the same place in every layer."""
    return _INDEX.sub(".*", name)


def _indices(name: str) -> tuple[str, ...]:
    return tuple(_INDEX.findall(name))


def expand(groups: Groups, model: Any) -> Groups:
    """Return the groups of a model of the same class with other layers: the same places in all of its layers."""
    names = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    offsets = {pattern(group.norm): group.offset for group in groups.norms}
    readers: dict[str, set[str]] = {}
    for group in groups.norms:  # hybrids have other readers in other layers
        readers.setdefault(pattern(group.norm), set()).update(map(pattern, group.readers))
    outputs = {pattern(first): pattern(second) for first, second in groups.pairs}

    def like(found: Iterable[str]) -> tuple[str, ...]:
        wanted = set(map(pattern, found))
        return tuple(name for name in names if pattern(name) in wanted)

    def readers_of(norm: str) -> tuple[str, ...]:
        indices = _indices(norm)
        return tuple(n for n in like(readers[pattern(norm)]) if _indices(n)[: len(indices)] == indices)

    norms = tuple(NormGroup(norm, offsets[pattern(norm)], readers_of(norm)) for norm in like(offsets))
    pairs = tuple(
        (first, second)
        for first in like(outputs)
        for second in like([outputs[pattern(first)]])
        if _indices(first) == _indices(second)
    )
    return Groups(like(groups.embeddings), norms, like(groups.writers), pairs)
