#!/usr/bin/env python3
"""Which Linear weights the model code of the installed transformers reads by itself, class by class.

The converter applies the same rule (`int8convert.runtime.weight_readers`) to the classes of the model at hand,
whatever transformers is installed. This table shows what the rule finds in all classes, and tests/conversion compares
it with docs/weight-reads.md, so that a new transformers shows what it adds.

1. Parse each `modeling_*.py` of transformers. Nothing is imported.
2. Apply the rule to each class.
3. Keep the reads of Linear weights: the type of `self.a.b` is told from `self.a = Class(...)`, in the class itself and
   in those it names. Conv and embedding weights never become int8.

4. Leave out what a condition rules out for every int8 model, as T5 does: `if self.wo.weight.dtype != torch.int8`.

Costs some ten seconds. Not known: conditions on entries of a config, which the converter judges with the module at
hand. So a row may be of a branch that no checkpoint takes. An unknown type is shown with a question mark.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from int8convert.runtime.weight_readers import ANY, Read, ReadKind, is_reached, reads_in_source

LINEAR = frozenset({"Linear", "Conv1D"})
CONTAINERS = frozenset({"ModuleList", "Sequential", "ModuleDict"})

Row = tuple[str, str, str, str]
"""Model folder, class, path to the module, what is read."""


class Classes:
    """The classes of all model files: which attribute is made by which call. A file is parsed when it is asked for.

    Args:
        sources: model folder -> text of its modeling files.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._folders: dict[str, str] = {}
        for folder, source in sources.items():
            for name in re.findall(r"^class (\w+)", source, re.MULTILINE):
                self._folders.setdefault(name, folder)

    @cache  # noqa: B019, there is one
    def _nodes(self, folder: str) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.parse(self._sources[folder]).body if isinstance(node, ast.ClassDef)}

    @cache  # noqa: B019
    def _made(self, folder: str, class_name: str) -> dict[str, set[str]]:
        return _made_attributes(self._nodes(folder)[class_name])

    def types(self, folder: str, class_name: str, path: tuple[str, ...]) -> set[str]:
        """Names of the classes that `self.<path>` may be of; empty if that is not known."""
        here = {class_name}
        for part in path:
            if part == ANY or part.isdigit():
                continue  # an entry of a container, whose own type is that of its entries here
            here = {made for name in here for made in self._attribute(folder, name, part)}
        return here

    def _attribute(self, folder: str, class_name: str, attribute: str) -> set[str]:
        if class_name not in self._nodes(folder):
            folder = self._folders.get(class_name, "")
            if not folder:
                return set()
        if own := self._made(folder, class_name).get(attribute):
            return own
        bases = {_last_name(base) for base in self._nodes(folder)[class_name].bases} - {class_name}
        return {made for base in bases for made in self._attribute(folder, base, attribute)}


def _made_attributes(node: ast.ClassDef) -> dict[str, set[str]]:
    made: dict[str, set[str]] = defaultdict(set)
    for statement in ast.walk(node):
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Attribute) and _last_name(target.value) == "self":
                    made[target.attr] |= set(_called_classes(statement.value))
    return made


def _called_classes(node: ast.AST) -> Iterator[str]:
    """The classes whose instances an expression may be, or, of a container, may hold."""
    if isinstance(node, ast.IfExp):
        yield from _called_classes(node.body)
        yield from _called_classes(node.orelse)
    elif isinstance(node, ast.Call):
        name = _last_name(node.func)
        if name not in CONTAINERS:
            yield name
        else:
            for argument in node.args:
                yield from (_last_name(c.func) for c in ast.walk(argument) if isinstance(c, ast.Call))


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def find_rows() -> list[Row]:
    """The table, sorted."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    sources: dict[str, str] = defaultdict(str)
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        sources[path.parent.name] += path.read_text() + "\n"
    classes = Classes(sources)
    rows = set()
    for folder, source in sources.items():
        for class_name, reads in reads_in_source(source).items():
            for read in reads:
                if not is_reached(read, _int8_module(read.path)):
                    continue
                if (mark := _mark(classes, folder, class_name, read)) is not None:
                    rows.add((folder, class_name, ".".join(read.path) + mark, _kind(read)))
    return sorted(rows)


class _QuantizedConfig:
    """A config of which one entry is known. The name is the one that transformers' loaders set."""

    _is_quantized = True

    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"not known: {name}")  # no AttributeError, so that `hasattr` gives no answer either


def _int8_module(path: tuple[str, ...]) -> Any:
    """What is known of every int8 model: it is in eval mode, quantized, and this path leads to a Linear."""
    target: Any = nn.Linear(1, 1, device="meta")
    for part in reversed(path):
        target = SimpleNamespace(**{part: target})
    return SimpleNamespace(**{**vars(target), "training": False, "config": _QuantizedConfig()}) if path else target


def _mark(classes: Classes, folder: str, class_name: str, read: Read) -> str | None:
    """What to put behind a path: nothing for a Linear, a question mark for an unknown type. None: no Linear."""
    types = classes.types(folder, class_name, read.path)
    if read.kind is ReadKind.FIRST_DTYPE:
        return ".* ?"
    return "" if types & LINEAR else None if types else " ?"


def _kind(read: Read) -> str:
    return "weight" if read.kind is ReadKind.VALUES else "dtype"


def markdown(rows: list[Row]) -> str:
    """The table as a document."""
    lines = [
        "# Linear weights that model code reads",
        "",
        "A Linear layer that is int8 has codes for its `weight`, and `int8` for its `weight.dtype`. Model code that",
        "reads either, instead of calling the layer, computes garbage or fails. int8convert leaves such layers 16-bit.",
        "It does so in both formats, because `int8convert.load` keeps the codes in both. The code of a checkpoint",
        "(`--trust-remote-code`) is examined by the same rule. vLLM and SGLang have model code of their own, which is",
        "not examined.",
        "",
        f"The table lists what its rule finds in transformers {version('transformers')}.",
        "",
        "- `weight`: the values are read.",
        "- `dtype`: something is cast to the dtype of the weight.",
        "- `*` is any index, `?` a type that is not known from the source.",
        "",
        "A condition around a read is judged with the model at hand, so a row may be of a branch that no checkpoint",
        "takes. Written by `./scripts/find_weight_reads`.",
        "",
        "| model | class | module | read |",
        "|---|---|---|---|",
        *(f"| {folder} | {class_name} | {path} | {kind} |" for folder, class_name, path, kind in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table here, as Markdown")
    arguments = parser.parse_args()
    table = markdown(find_rows())
    if arguments.write:
        arguments.write.write_text(table)
    else:
        print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
