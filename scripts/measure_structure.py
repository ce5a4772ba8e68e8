#!/usr/bin/env python3
"""Print the size and shape of the packages in a checkout: `scripts/measure_structure.py [DIR]`, by default this one.

It reads int8convert/ and cuda_kernels/ as text and syntax. It imports nothing of them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("int8convert", "cuda_kernels")

NAMES = (
    *("bitsandbytes", "compressed-tensors", "torchao", "fp8", "finegrained_fp8", "gptq", "awq", "mxfp4", "bitnet"),
    *("int-quantized", "pack-quantized", "float-quantized", "naive-quantized"),
)
FORMAT_NAME = re.compile(
    r"""(==|!=|\bis\b|\bin\b|\bcase\b|\bif\b|\belse\b|startswith)"""
    rf""".*(Format\.[A-Z]|BITSANDBYTES|COMPRESSED|TORCHAO|["']({"|".join(NAMES)})["'])"""
)
"""Lines that compare the name of a format, or branch on it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: Path, top: Path) -> str:
    return ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, but for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in inner)


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def functions_of(node: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield within + child.name, child
        if isinstance(child, Function | ast.ClassDef):
            yield from functions_of(child, f"{within}{child.name}.")


def n_lines(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def n_parameters(function: Function) -> int:
    a = function.args
    names = [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + (a.vararg is not None) + (a.kwarg is not None)


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.removesuffix(".__init__").split("."))


def print_sizes(lines: dict[Path, int]) -> None:
    packages: dict[str, list[int]] = {}
    for path, n in lines.items():
        packages.setdefault("/".join(path.parts[: 2 if len(path.parts) > 2 else 1]), []).append(n)
    print(f"{'package':28} files   lines")
    for package, sizes in (*sorted(packages.items()), ("all", [*lines.values()])):
        print(f"{package:28} {len(sizes):5}  {sum(sizes):6,}")


def main() -> None:
    top = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    paths = [path for package in PACKAGES for path in sorted((top / package).rglob("*.py"))]
    texts = {path.relative_to(top): path.read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    modules = {module_of(top / path, top): path for path in texts}
    functions = [(path, *each) for path, tree in trees.items() for each in functions_of(tree)]
    public = [each for each in functions if is_public(each[1]) and "int8convert/cli" not in str(each[0])]

    print_sizes(lines)
    compared = [path for path, text in texts.items() for line in text.splitlines() if FORMAT_NAME.search(line)]
    outside = Counter(str(path) for path in compared if path.parts[1] != "formats")
    print(f"lines that compare a format's name: {len(compared)} in {len(set(compared))} files")
    print(f"  outside formats/: {outside.total()} in {dict(outside.most_common())}")
    circle = circle_of({n: {*imports_of(trees[p], {*modules})} - {n, "int8convert"} for n, p in modules.items()})
    print(f"import circle: {' > '.join(circle) or 'none'}")
    (folder, n_files), *_ = Counter(path.parent for path in texts).most_common(1)
    print(f"files in the largest folder: {n_files} ({folder})")
    longest = max(lines, key=lambda path: lines[path])
    print(f"longest module: {lines[longest]} lines ({longest})")
    path, name, function = max(functions, key=lambda each: n_lines(each[2]))
    print(f"longest function: {n_lines(function)} lines ({path}: {name})")
    path, name, function = max(public, key=lambda each: n_parameters(each[2]))
    print(f"most parameters of a public function outside the command line: {n_parameters(function)} ({path}: {name})")


if __name__ == "__main__":
    main()
