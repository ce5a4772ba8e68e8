#!/usr/bin/env python3
"""Derives the table in int8convert/runtime/weight_reads.py: the Linear weights that model code reads by itself.

1. Parse every module of the installed transformers, and torch.nn. Nothing is imported.
2. Find the reads in each class (`reads_in_source`).
3. Keep those of Linear weights: the type of `self.a.b` is told from `self.a = Class(...)`, in the class itself and in
   those it names. Conv and embedding weights never become int8. A read of an unknown type is kept.
4. Leave out what a condition rules out for every int8 model, as T5 does: `if self.wo.weight.dtype != torch.int8`.

Costs some five seconds. Not known: conditions on entries of a config. So a row may be of a branch that no checkpoint
takes; CONDITIONS in that module has those that matter.
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

from int8convert.runtime.weight_reads import ANY, ReadKind
from scripts.reads_in_source import Read, is_reached, reads_in_source, split_statements

MODULE = Path(__file__).resolve().parents[1] / "int8convert/runtime/weight_reads.py"
TORCH = "torch"
"""The folder name of torch.nn."""

LINEAR = frozenset({"Linear", "Conv1D", "NonDynamicallyQuantizableLinear"})
CONTAINERS = frozenset({"ModuleList", "Sequential", "ModuleDict"})

Row = tuple[str, str, str, ReadKind]
"""Folder, class, path to the module, what is read."""


class Classes:
    """The classes of all model files: which attribute is made by which call. A file is parsed when it is asked for.

    Args:
        sources: model folder -> text of its files.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._folders: dict[str, str] = {}
        for folder, source in sources.items():
            for name in re.findall(r"^class (\w+)", source, re.MULTILINE):
                self._folders.setdefault(name, folder)

    @cache  # noqa: B019, there is one
    def _classes(self, folder: str) -> dict[str, str]:
        """Name -> text, of the classes of a folder."""
        return {
            match[1]: text
            for text in split_statements(self._sources[folder])
            if (match := re.match(r"class (\w+)", text))
        }

    @cache  # noqa: B019
    def _node(self, folder: str, class_name: str) -> ast.ClassDef:
        try:
            nodes = ast.parse(self._classes(folder)[class_name]).body
        except SyntaxError:
            nodes = ast.parse(self._sources[folder]).body
        return next(node for node in reversed(nodes) if isinstance(node, ast.ClassDef) and node.name == class_name)

    @cache  # noqa: B019
    def _made(self, folder: str, class_name: str) -> dict[str, set[str]]:
        return _made_attributes(self._node(folder, class_name))

    def types(self, folder: str, class_name: str, path: tuple[str, ...]) -> set[str]:
        """Names of the classes that `self.<path>` may be of; empty if that is not known."""
        here = {class_name}
        for part in path:
            if part == ANY or part.isdigit():
                continue  # an entry of a container, whose own type is that of its entries here
            here = {made for name in here for made in self._attribute(folder, name, part)}
        return here

    def is_linear(self, folder: str, class_name: str) -> bool:
        """Whether a class is a Linear, or one derived from it."""
        if class_name in LINEAR:
            return True
        if class_name not in self._classes(folder):
            if class_name not in self._folders:
                return False
            folder = self._folders[class_name]
        bases = self._node(folder, class_name).bases
        return any(self.is_linear(folder, name) for base in bases if (name := _last_name(base)) != class_name)

    def _attribute(self, folder: str, class_name: str, attribute: str) -> set[str]:
        if class_name not in self._classes(folder):
            folder = self._folders.get(class_name, "")
            if not folder:
                return set()
        if own := self._made(folder, class_name).get(attribute):
            return own
        bases = {_last_name(base) for base in self._node(folder, class_name).bases} - {class_name}
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


def read_sources() -> dict[str, str]:
    """Return the text of all modules: folder of transformers' models -> its files, "" -> the others of transformers."""
    sources: dict[str, str] = defaultdict(str)
    for path in sorted(_folder("transformers").rglob("*.py")):
        if not path.name.startswith("modular_"):  # from which the modeling files are made
            is_model = path.parent.parent.name == "models"
            sources[path.parent.name if is_model else ""] += path.read_text() + "\n"
    sources[TORCH] = "\n".join(path.read_text() for path in sorted((_folder("torch") / "nn/modules").glob("*.py")))
    future = re.compile(r"^from __future__.*$", re.MULTILINE)  # stands at the beginning of a file only
    return {folder: future.sub("", source) for folder, source in sources.items()}


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def _found() -> list[tuple[str, str, Read]]:
    """Return the reads that count: folder, class, read."""
    sources = read_sources()
    classes = Classes(sources)
    return [
        (folder, class_name, read)
        for folder, source in sources.items()
        for class_name, reads in reads_in_source(source).items()
        for read in reads
        if is_reached(read, _int8_module(read.path)) and _may_be_linear(classes, folder, class_name, read)
    ]


def find_rows() -> list[Row]:
    """Return the rows, sorted: folder, class, path of the module, and what is read."""
    return sorted({(folder, class_name, ".".join(read.path), read.kind) for folder, class_name, read in _found()})


def find_conditions() -> dict[str, set[str]]:
    """Return the conditions on a module's own attributes around the reads of transformers, by class."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder, class_name, read in _found():
        asked = {ast.unparse(test) for test, wanted in read.guards if wanted and _asks_self(test)}
        if asked and folder != TORCH:
            found[class_name] |= asked
    return dict(found)


def _asks_self(test: ast.expr) -> bool:
    """Whether a condition depends on the module's own numbers and truths alone."""
    nodes = list(ast.walk(test))
    is_own = all(node.id == "self" for node in nodes if isinstance(node, ast.Name))
    asked = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return is_own and not asked & {"weight", "training", "dtype"} and not any(isinstance(n, ast.Call) for n in nodes)


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


def _may_be_linear(classes: Classes, folder: str, class_name: str, read: Read) -> bool:
    """Whether a read is of a Linear weight, or of one whose type the source does not tell."""
    types = classes.types(folder, class_name, read.path)
    return read.kind is ReadKind.FIRST_DTYPE or not types or any(classes.is_linear(folder, name) for name in types)


def table(rows: list[Row]) -> str:
    """Return the rows as the part of the module that holds them."""
    lines = [
        f'READS_VERSION = "{version("transformers")}"',
        '"""Version of transformers whose classes were searched."""',
    ]
    for name, in_torch in (("READS", False), ("TORCH_READS", True)):
        lines.append(f"{name}: Mapping[ReadKind, Mapping[str, tuple[str, ...]]] = {{")
        for kind in ReadKind:
            paths: dict[str, set[str]] = defaultdict(set)
            for folder, class_name, path, found in rows:
                if found is kind and (folder == TORCH) == in_torch:
                    paths[class_name].add(path)
            if paths:
                lines.append(f"    ReadKind.{kind.name}: {{")
                for class_name, its in sorted(paths.items()):
                    shown = ", ".join(f'"{path}"' for path in sorted(its)) + ("," if len(its) == 1 else "")
                    lines.append(f'        "{class_name}": ({shown}),')
                lines.append("    },")
        lines += ["}", f'"""What the classes of {"torch.nn" if in_torch else "transformers"} read, by class: paths."""']
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into int8convert/runtime/weight_reads.py")
    arguments = parser.parse_args()
    found = table(find_rows())
    if arguments.write:
        text = MODULE.read_text()
        begin, end = text.index("READS_VERSION = "), text.index("CONDITIONS: ")
        MODULE.write_text(f"{text[:begin]}{found}{text[end:]}")
    else:
        print(found, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
