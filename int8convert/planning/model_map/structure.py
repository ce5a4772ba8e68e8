"""Finds the structure of checkpoints: the answer of the child process without sizes and numbers of layers.

A structure is made of samples of one class, at one size or several. `structure_match` answers by it for a checkpoint of
another size. Names are patterns: `model.layers.7.fc1.weight` is `model.layers.#.fc1.weight`. Dimensions, and numbers of
layers and experts, are links to the config's sizes (`sizes`). The rest of the config has to be the same.

Checkpoints that lack or mismatch anything have no structure, and neither have those whose tensors share bytes.

A structure is a JSON object, see `find_structure`. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from int8convert.planning.model_map.links import Links
from int8convert.planning.model_map.name_patterns import (
    LayerKinds,
    Names,
    containers,
    expected,
    generalize,
    layer_kinds,
)
from int8convert.planning.model_map.sizes import ConfigParts, UnknownStructureError, kind_at, read_config
from int8convert.planning.name_rules import CONFIG_DTYPE

FLOATS = frozenset({"F32", "F16", "BF16"})
STORED_DTYPE = {name: dtype for dtype, name in CONFIG_DTYPE.items()}


@dataclass(frozen=True, slots=True)
class Sample:
    """A checkpoint and the child's answer on it.

    Attributes:
        config: config.json.
        request: see `process.worker_request`.
        answer: see `worker.answer`, as JSON.
    """

    config: Mapping[str, Any]
    request: Mapping[str, Any]
    answer: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Form:
    """What the tensors of one pattern in one sample have in common.

    Attributes:
        decision: action, reason, names with `#`, whether it is stored [in, out], counts as parameters, is skipped.
        numbers: shape, and the number of experts of a fused tensor.
        dtypes: ways to name the output's dtype: "stored", "model", or a dtype.
    """

    decision: str
    numbers: tuple[int, ...]
    dtypes: frozenset[str]


class _Collapsed:
    """The patterns of one sample.

    Attributes:
        conflicts: containers whose members differ.
        forms: kind of layer and pattern -> form.
        counts: container -> number of members.
    """

    def __init__(self, sample: Sample, parts: ConfigParts, names: Names, differing: LayerKinds) -> None:
        split = {name: names.split(name) for name, *_ in sample.request["tensors"]}
        self.conflicts: set[str] = set()
        self.counts = self._count(split.values())
        kind_of = {c: layer_kinds(parts, n, differing) for c, n in self.counts.items()}
        found: Counter[tuple[str, str]] = Counter()
        self.forms: dict[tuple[str, str], _Form] = {}
        forms = _Forms(sample)
        for tensor in sample.request["tensors"] if not self.conflicts else ():
            pattern, indices = split[tensor[0]]
            within = containers(pattern)
            key = (kind_of[within[0]][indices[0]] if within else "", pattern)
            found[key] += 1
            form = forms.of(tensor, indices)
            if self.forms.setdefault(key, form) != form:
                self.conflicts.add(within[-1])
        for (kind, pattern), n in found.items():
            if n != expected(pattern, self.counts, kind_of, kind):
                self.conflicts.add(containers(pattern)[-1])

    def _count(self, split: Any) -> dict[str, int]:
        members: dict[str, dict[tuple[int, ...], set[int]]] = {}
        for pattern, indices in split:
            for i, container in enumerate(containers(pattern)):
                members.setdefault(container, {}).setdefault(indices[:i], set()).add(indices[i])
        counts = {}
        for container, each in members.items():
            first, *others = each.values()
            if first != {*range(len(first))} or any(other != first for other in others):
                self.conflicts.add(container)
            counts[container] = len(first)
        return counts


class _Forms:
    """Makes the form of each tensor of a sample."""

    def __init__(self, sample: Sample) -> None:
        answer = sample.answer
        self._decided = answer["tensors"]
        self._dtype = answer["dtype"]
        self._skipped = {*answer["skip_modules"]}
        self._uncounted = {*answer["uncounted"]}
        self._parameter = _own_parameters(answer)

    def of(self, tensor: Sequence[Any], indices: tuple[int, ...]) -> _Form:
        name, stored, shape, place = tensor
        action, reason, output_name, dtype, layout = self._decided[name]
        if stored not in FLOATS or place is not None or "#" in name:
            raise UnknownStructureError(name)
        parameter, is_transposed = self._parameter.get(name, ("", False))
        general = [
            *(action, reason, generalize(output_name, indices), generalize(parameter, indices), is_transposed),
            *(name not in self._uncounted, parameter.removesuffix(".weight") in self._skipped),
            layout and {**layout, "module": generalize(layout["module"], indices), "n_experts": 0},
        ]
        ways = {"stored": stored, "model": STORED_DTYPE[self._dtype], dtype: dtype}
        numbers = (*shape, layout["n_experts"]) if layout else tuple(shape)
        return _Form(json.dumps(general), numbers, frozenset(way for way, is_it in ways.items() if is_it == dtype))


def find_structure(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Return the structure of samples; None if they have none, or none in common.

    A structure is a JSON object with these entries:

    - `model_class`, `output_format`, `notes`: as in the answers. `dtypes`: those that the model may have.
    - `flags`: all of the config but sizes and harmless entries. `optional`: those that config.json may lack. `ignored`:
      further entries that it may have. `rope_types`: see `ConfigParts`.
    - `layer_lists`: list of the kinds of layers -> kinds that are known.
    - `sizes`: size -> its only value; None where any will do. `absent`: size -> link where config.json lacks it.
    - `aliases`: other name of an entry of the config -> its name.
    - `quotients`: those that have to be whole.
    - `layers`, `fixed`: see `LayerKinds` and `Names`. `counts`: container -> links of the number of its members.
    - `tensors`: kind of layer -> pattern -> decision, links of each number, and ways to name the dtype, see `_Form`.
    - `skip_modules`, `parameters`: those of no tensor's own.
    """
    found = []
    for differing in LayerKinds if len(samples) > 1 else (LayerKinds.ALIKE, LayerKinds.BY_CONFIG):
        try:
            found.append(_structure_of(samples, differing))
        except (UnknownStructureError, LookupError, TypeError, ValueError):
            continue
    return min(found, key=lambda structure: len(structure["fixed"]), default=None)


def _structure_of(samples: Sequence[Sample], differing: LayerKinds) -> dict[str, Any]:
    parts = [read_config(sample.config) for sample in samples]
    _check_alike(samples, parts)
    names = Names(frozenset())
    while True:
        collapsed = [_Collapsed(s, p, names, differing) for s, p in zip(samples, parts, strict=True)]
        conflicts = {container for each in collapsed for container in each.conflicts}
        if not conflicts:
            break
        names = Names(names.fixed | conflicts)
    first = collapsed[0]
    if any(each.forms.keys() != first.forms.keys() for each in collapsed):
        raise UnknownStructureError("the samples have other names")
    links = Links([each.sizes for each in parts])
    counts = {c: links.of_count(tuple(each.counts[c] for each in collapsed)) for c in first.counts}
    tensors: dict[str, dict[str, Any]] = {}
    for kind, pattern in first.forms:
        tensors.setdefault(kind, {})[pattern] = _joined([each.forms[kind, pattern] for each in collapsed], links)
    numbers = [number for each in tensors.values() for _, numbers, _ in each.values() for number in numbers]
    linked = {path for each in (*counts.values(), *numbers) for link in each for path in links.paths(link)}
    answer = samples[0].answer
    own = _own_parameters(answer)
    skipped = {name.removesuffix(".weight") for name, _ in own.values()}
    return {
        "model_class": answer["model_class"],
        "output_format": samples[0].request["output_format"],
        "dtypes": sorted({each.answer["dtype"] for each in samples}),
        "flags": parts[0].flags,
        "layer_lists": _kinds_seen(parts),
        "rope_types": sorted({rope_type for each in parts for rope_type in each.rope_types}),
        "optional": [],
        "ignored": [],
        "aliases": {},
        "sizes": {path: _fixed_size(path, [each.sizes[path] for each in parts], linked) for path in parts[0].sizes},
        "absent": {},
        "quotients": links.quotients,
        "layers": differing,
        "fixed": sorted(names.fixed),
        "counts": counts,
        "tensors": tensors,
        "skip_modules": [_without_index(name) for name in answer["skip_modules"] if name not in skipped],
        "parameters": {
            _without_index(name): [_without_index(key), turned]
            for name, (key, turned) in answer["parameters"].items()
            if own[key][0] != name
        },
        "notes": answer["notes"],
    }


def _check_alike(samples: Sequence[Sample], parts: Sequence[ConfigParts]) -> None:
    """Refuse samples that differ in more than sizes and dtypes, and those whose model lacks or ignores something."""
    for sample, each in zip(samples, parts, strict=True):
        request, needs = sample.request, sample.answer["needs"]
        sizes = {t[0]: prod(t[2]) for t in request["tensors"]}
        n_parameters = sum(sizes.values()) - sum(sizes[name] for name in sample.answer["uncounted"])
        is_whole = needs["n_parameters"] == n_parameters and not any(v for k, v in needs.items() if k != "n_parameters")
        is_alike = (each.flags, each.sizes.keys()) == (parts[0].flags, parts[0].sizes.keys())
        if not is_whole or not is_alike or request["skip"] or request["only"]:
            raise UnknownStructureError(sample.answer["model_class"])


def _kinds_seen(parts: Sequence[ConfigParts]) -> dict[str, list[str]]:
    return {path: sorted({v for each in parts for v in each.layer_lists[path]}) for path in parts[0].layer_lists}


def _fixed_size(path: str, values: Sequence[int], linked: set[str]) -> int | None:
    """Return the only value that a size may have; None where any will do.

    Free are those that differ between the samples. In one sample, those are that a shape or a number of layers follows,
    and those that shape nothing: heads, where there is no matrix for each, and positions, where they have no table.
    """
    is_free = path in linked or kind_at(path) in ("heads", "positions") if len(values) == 1 else len({*values}) > 1
    return None if is_free else values[0]


def _own_parameters(answer: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Return key -> the parameter it is loaded into; those that are tied to it are listed before."""
    return {key: (name, turned) for name, (key, turned) in answer["parameters"].items()}


def _without_index(name: str) -> str:
    """Return a name of no tensor, which would have no pattern."""
    if any(part.isdecimal() for part in name.split(".")):
        raise UnknownStructureError(name)
    return name


def _joined(forms: Sequence[_Form], links: Links) -> list[Any]:
    """Return what the forms of one pattern have in common: decision, links of the numbers, ways to name the dtype."""
    ways = forms[0].dtypes.intersection(*(each.dtypes for each in forms))
    if not ways or any((f.decision, len(f.numbers)) != (forms[0].decision, len(forms[0].numbers)) for f in forms):
        raise UnknownStructureError(forms[0].decision)
    numbers = [links.of_shape(values) for values in zip(*(each.numbers for each in forms), strict=True)]
    return [json.loads(forms[0].decision), numbers, sorted(ways)]


def outline(config: Mapping[str, Any], request: Mapping[str, Any]) -> list[Any]:
    """Return what checkpoints of one structure have in common, for a key: not whether they are of one structure."""
    try:
        parts = read_config(config)
    except UnknownStructureError:
        return []
    patterns = sorted({Names(frozenset()).split(name)[0] for name, *_ in request["tensors"]})
    lists = {path: sorted({*values}) for path, values in parts.layer_lists.items()}
    return [parts.flags, [*parts.sizes], lists, model_dtype(config, request), request["output_format"], patterns]


def model_dtype(config: Mapping[str, Any], request: Mapping[str, Any]) -> Any:
    """Return the model's dtype as in config.json; None where the config contradicts itself."""
    stated = [config[name] for name in ("dtype", "torch_dtype") if config.get(name)]
    return (stated or [request["dtype"]])[0] if stated[1:] in ([], stated[:1]) else None
