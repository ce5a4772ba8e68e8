"""Splits the names of tensors into patterns and indices: layers and experts that are alike share a pattern.

`model.layers.7.fc1.weight` is `model.layers.#.fc1.weight` and (7,). The module that holds numbered members, here
`model.layers`, is a container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from int8convert.planning.model_map.sizes import ConfigParts, kind_at


@dataclass(frozen=True, slots=True)
class Names:
    """Splits names into a pattern and indices: `model.layers.7.fc1.weight` is `model.layers.#.fc1.weight` and (7,).

    Attributes:
        fixed: containers whose members differ, so that their indices stay in the pattern: `mlp`, for `mlp.0.weight`.
    """

    fixed: frozenset[str]

    def split(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return the pattern of a name, and its indices."""
        pattern, indices = "", []
        for part in name.split("."):
            is_index = part.isdecimal() and part.isascii() and bool(pattern) and pattern not in self.fixed
            if is_index:
                indices.append(int(part))
            pattern = f"{pattern}.{'#' if is_index else part}" if pattern else part
        return pattern, tuple(indices)


def containers(pattern: str) -> list[str]:
    """Return the modules that hold numbered members in a pattern: `a.#.b.#.c` has `a` and `a.#.b`."""
    parts = pattern.split(".")
    return [".".join(parts[:i]) for i, part in enumerate(parts) if part == "#"]


def generalize(text: str, indices: Sequence[int]) -> str:
    """Return a name with its indices replaced by `#`, in their order."""
    left, parts = list(indices), []
    for part in text.split("."):
        if left and part == str(left[0]):
            left.pop(0)
            part = "#"
        parts.append(part)
    return ".".join(parts)


def fill(text: str, indices: Sequence[int]) -> str:
    """Return a name with the first `#` replaced by the first index, and so on."""
    for index in indices:
        text = text.replace("#", str(index), 1)
    return text


class LayerKinds(StrEnum):
    """How the layers of a structure differ."""

    ALIKE = "alike"
    BY_CONFIG = "by config"
    """Lists of kinds, and the number of dense layers before those of experts."""
    FIRST = "first"
    """The first one differs from the others. One sample does not prove that."""


def layer_kinds(parts: ConfigParts, n_layers: int, differing: LayerKinds) -> list[str]:
    """Return the kind of each layer; "" where all are alike."""
    if differing is not LayerKinds.BY_CONFIG:
        return [""] * n_layers if differing is LayerKinds.ALIKE else ["first", *[""] * (n_layers - 1)]
    lists = [values for _, values in sorted(parts.layer_lists.items()) if len(values) == n_layers]
    edges = [value for path, value in parts.sizes.items() if kind_at(path) == "dense layers"]
    return [
        "|".join([*(values[i] for values in lists), *("dense" for edge in edges if i < edge)]) for i in range(n_layers)
    ]


def expected(pattern: str, counts: Mapping[str, int], kinds: Mapping[str, list[str]], kind: str) -> int:
    """Return the number of tensors that a pattern has where it is complete."""
    within = containers(pattern)
    if not within:
        return 1
    return kinds[within[0]].count(kind) * prod(counts[container] for container in within[1:])
