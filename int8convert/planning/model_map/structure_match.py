"""Answers for a checkpoint by a structure that was found at other sizes.

The checkpoint is of a structure if

1. everything in its config.json but sizes and harmless entries is the same,
2. its names are those of the patterns, for each layer and each expert that the config counts, and no others, and
3. each dimension is what all of its links give.

So the model has these parameters in these shapes, lacks none, and ignores none. What the child process decides follows
from names, classes and dtypes then.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from int8convert.planning.model_map.links import evaluate
from int8convert.planning.model_map.name_patterns import LayerKinds, Names, containers, expected, fill, layer_kinds
from int8convert.planning.model_map.sizes import ConfigParts, Sizes, UnknownStructureError, kind_at, read_config
from int8convert.planning.model_map.structure import FLOATS, STORED_DTYPE, model_dtype

_MAX_LAYERS = 10_000
_NO_NEEDS: dict[str, Any] = {
    **{"n_parameters": 0, "missing": {}, "defaulted": [], "counters": [], "unexpected": []},
    **{"mismatched": {}, "integers": {}},
}


def apply_structure(structure: Mapping[str, Any], config: Mapping[str, Any], request: Mapping[str, Any]) -> Any:
    """Return the child's answer on a checkpoint of a structure, without `candidates`.

    Raises:
        UnknownStructureError: the checkpoint is not of this structure.
    """
    aliases = structure["aliases"]
    if any(name in config for alias, name in aliases.items() if alias in config):
        raise UnknownStructureError("an entry under two names")
    parts = read_config({aliases.get(name, name): value for name, value in config.items()})
    sizes = _matching_sizes(structure, parts, request)
    dtype = model_dtype(config, request)
    if dtype not in structure["dtypes"]:
        raise UnknownStructureError(dtype)
    counts = {container: _agreed(links, sizes) for container, links in structure["counts"].items()}
    kinds = {c: layer_kinds(parts, n, LayerKinds(structure["layers"])) for c, n in counts.items()}
    if max(counts.values(), default=0) > _MAX_LAYERS or any(
        len(values) not in counts.values() for values in parts.layer_lists.values()
    ):
        raise UnknownStructureError("layers")
    return _Application(structure, sizes, counts, kinds, dtype).answer(request["tensors"])


def _matching_sizes(structure: Mapping[str, Any], parts: ConfigParts, request: Mapping[str, Any]) -> Sizes:
    """Return the sizes of a config that differs from a structure's in nothing else."""
    optional, ignored = {*structure["optional"]}, {*structure["ignored"]}
    lists, flags = structure["layer_lists"], structure["flags"]
    stated = {path: value for path, value in parts.flags.items() if path not in ignored}
    is_alike = (
        request["output_format"] == structure["output_format"]
        and not (request["skip"] or request["only"])
        and parts.rope_types <= {*structure["rope_types"]}
        and all(path in flags and _same(flags[path], value) for path, value in stated.items())
        and all(path in lists and {*values} <= {*lists[path]} for path, values in parts.layer_lists.items())
        and all(path in stated or path in optional for path in flags)
        and all(path in parts.layer_lists or path in optional for path in lists)
        and all(path in structure["sizes"] for path in parts.sizes)
    )
    sizes = dict(parts.sizes)
    for path, link in structure["absent"].items() if is_alike else ():
        if path not in sizes:
            sizes[path] = evaluate(link, sizes)
    for path, fixed in structure["sizes"].items() if is_alike else ():
        is_alike = is_alike and path in sizes and fixed in (None, sizes[path])
    heads = [path for path in sizes if kind_at(path) == "head width"]
    if not is_alike or any(evaluate(each, sizes) % 2 for each in (*structure["quotients"], *heads)):
        raise UnknownStructureError(structure["model_class"])
    return sizes


def _same(a: Any, b: Any) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # True is not 1


def _agreed(links: Sequence[str], sizes: Sizes) -> int:
    values = {evaluate(link, sizes) for link in links}
    if len(values) != 1:
        raise UnknownStructureError(links[0])
    return values.pop()


class _Application:
    """Applies a structure to the tensors of one checkpoint.

    Args:
        counts: container -> number of its members.
        kinds: container -> kind of each member, where it is the outermost.
        dtype: the model's, as in config.json.
    """

    def __init__(
        self,
        structure: Mapping[str, Any],
        sizes: Sizes,
        counts: Mapping[str, int],
        kinds: Mapping[str, list[str]],
        dtype: str,
    ) -> None:
        self._structure, self._counts, self._kinds, self._dtype = structure, counts, kinds, dtype
        self._names = Names(frozenset(structure["fixed"]))
        self._entries = {
            (kind, pattern): (decision, tuple(_agreed(links, sizes) for links in numbers), ways)
            for kind, by_name in structure["tensors"].items()
            if kind == "" or any(kind in each for each in kinds.values())
            for pattern, (decision, numbers, ways) in by_name.items()
        }

    def answer(self, tensors: Sequence[Sequence[Any]]) -> dict[str, Any]:
        structure = self._structure
        found: Counter[tuple[str, str]] = Counter()
        skipped, n_parameters = {*structure["skip_modules"]}, 0
        decided: dict[str, Any] = {}
        parameters = dict(structure["parameters"])
        for name, stored, shape, place in tensors:
            pattern, indices = self._names.split(name)
            within = containers(pattern)
            key = (self._kind(within[0], indices[0]) if within else "", pattern)
            if (
                key not in self._entries
                or place is not None
                or any(index >= self._counts[container] for container, index in zip(within, indices, strict=True))
            ):
                raise UnknownStructureError(name)
            found[key] += 1
            decision, numbers, ways = self._entries[key]
            action, reason, output_name, parameter, is_transposed, is_counted, is_skipped, layout = decision
            self._check_shape(shape, numbers, layout)
            named = {"stored": stored, "model": STORED_DTYPE[self._dtype]}
            dtypes = {named.get(way, way) for way in ways}
            if stored not in FLOATS or len(dtypes) != 1:
                raise UnknownStructureError(name)
            if layout:
                layout = {**layout, "module": fill(layout["module"], indices), "n_experts": numbers[-1]}
            decided[name] = [action, reason, fill(output_name, indices), dtypes.pop(), layout]
            loaded_into = fill(parameter, indices)
            if parameter:
                parameters[loaded_into] = [name, is_transposed]
            if is_skipped:
                skipped.add(loaded_into.removesuffix(".weight"))
            n_parameters += prod(shape) if is_counted else 0
        self._check_complete(found)
        return {
            "model_class": structure["model_class"],
            "dtype": self._dtype,
            "tensors": decided,
            "skip_modules": sorted(skipped),
            "candidates": [],
            "parameters": parameters,
            "notes": structure["notes"],
            "needs": {**_NO_NEEDS, "n_parameters": n_parameters},
        }

    def _kind(self, container: str, index: int) -> str:
        kinds = self._kinds.get(container, [])
        if index >= len(kinds):
            raise UnknownStructureError(container)
        return kinds[index]

    def _check_shape(self, shape: Sequence[int], numbers: tuple[int, ...], layout: Any) -> None:
        """Refuse another shape, and square matrices of experts, whose layout the shape does not show."""
        is_square = layout and layout["leaf"] == "weight" and shape[-1] == shape[-2]
        if tuple(shape) != (numbers[:-1] if layout else numbers) or is_square:
            raise UnknownStructureError(f"{shape}")

    def _check_complete(self, found: Counter[tuple[str, str]]) -> None:
        """Refuse a checkpoint that lacks a tensor, or has a kind of layer that the samples have not."""
        known: dict[str, set[str]] = {}
        for kind, pattern in self._entries:
            if found[kind, pattern] != expected(pattern, self._counts, self._kinds, kind):
                raise UnknownStructureError(pattern)
            for container in containers(pattern)[:1]:
                known.setdefault(container, set()).add(kind)
        if any(not known[container].issuperset(self._kinds[container]) for container in known):
            raise UnknownStructureError("a kind of layer")
