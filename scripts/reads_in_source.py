"""Finds, in the source of model code, each look at the weight of another module. Runs nothing.

1. Parse the classes. Collect each `self.<path>.weight` and each `next(self.<path>.parameters()).dtype` in methods other
   than set-up, with the conditions around it.
2. Judge a condition by what is known of the module, with int8 for the dtype of a Linear weight. T5's
   `if self.wo.weight.dtype != torch.int8` rules a read out.

Not known: a weight that is reached by another expression, such as a module passed to a function or held in a local
variable. A getter counts if its own file calls it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from int8convert.runtime.weight_reads import ANY, ReadKind

_SET_UP = (
    "__init__",
    "_init",
    "init_",
    "reset_",
    "_tie",
    "tie_",
    "resize_",
    "_resize",
    "set_",
    "_prune",
    "prune",
)
_FACTS = frozenset({"device", "shape", "ndim", "size", "is_meta", "is_floating_point"})
"""What may be asked of a weight without reading it, and without an answer that int8 changes for the worse."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda value, values: value in values,
    ast.NotIn: lambda value, values: value not in values,
}

_READ = re.compile(r"\bself(\.\w+|\[[^\]\n]*\])+\.weight\b|\.parameters\(\)\)\.dtype\b")
"""Cheap to look for. Parsing takes a second for the largest file, and most statements have nothing to find."""

_STATEMENT = re.compile(r"^(?![\s#)\]}]|(?:elif|else|except|finally)\b)", re.MULTILINE)
"""Where a statement of a module begins: in the first column."""

Guard = tuple[ast.expr, bool]
"""A condition, and the value it must have for the code below it to be reached."""


class Read(NamedTuple):
    """One look at a weight.

    Attributes:
        path: from the module whose code looks, to the module whose weight it is; for FIRST_DTYPE, to one above it.
        kind: what is read.
        guards: the conditions around it.
    """

    path: tuple[str, ...]
    kind: ReadKind
    guards: tuple[Guard, ...]


def is_reached(read: Read, module: Any) -> bool:
    """Whether the conditions around a read allow it in a module whose Linear weights are int8."""
    return all(_truth(condition, module) in (wanted, None) for condition, wanted in read.guards)


def reads_in_source(source: str) -> dict[str, list[Read]]:
    """Class -> reads in its methods, without those of its base classes, for all classes of a Python source."""
    called = frozenset(re.findall(r"\.(\w+)", source))
    found = {}
    for node in _classes_in(_statements_that_read(source)):
        reader = _Reader(called)
        reader.visit(node)
        found[node.name] = reader.reads
    return found


def split_statements(source: str) -> list[str]:
    """The statements of a Python module, as text.

    A line of a string that begins in the first column splits the statement, too. Neither part is valid Python then.
    """
    begins = [match.start() for match in _STATEMENT.finditer(source)]
    return [source[begin:end] for begin, end in zip(begins, [*begins[1:], len(source)], strict=True)]


def _statements_that_read(source: str) -> list[ast.stmt]:
    """The statements of a module that may look at a weight."""
    if not _READ.search(source):
        return []
    try:
        return [node for text in split_statements(source) if _READ.search(text) for node in ast.parse(text).body]
    except SyntaxError:
        return ast.parse(source).body


def _classes_in(statements: Sequence[ast.stmt]) -> Iterator[ast.ClassDef]:
    """The classes a Python module defines, those under a condition or a `try` as well."""
    for statement in statements:
        if isinstance(statement, ast.ClassDef):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):
            yield from _classes_in([*statement.body, *statement.orelse])
            for handler in getattr(statement, "handlers", ()):
                yield from _classes_in(handler.body)


class _Reader(ast.NodeVisitor):
    """Collects reads with the conditions around them.

    Args:
        called: names that the file uses as attributes.
    """

    def __init__(self, called: frozenset[str]) -> None:
        self.reads: list[Read] = []
        self._called = called
        self._guards: tuple[Guard, ...] = ()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        is_dead = node.name.startswith("get_") and node.name not in self._called
        if not node.name.startswith(_SET_UP) and not is_dead:
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._visit_branches(node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._visit_branches(node.test, [node.body], [node.orelse])

    def _visit_branches(self, test: ast.expr, body: Sequence[ast.AST], otherwise: Sequence[ast.AST]) -> None:
        self.visit(test)
        before = self._guards
        for children, wanted in ((body, True), (otherwise, False)):
            self._guards = (*before, (test, wanted))
            for child in children:
                self.visit(child)
        self._guards = before

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")):
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for operand in (node.left, *node.comparators):
            if _read_dtype(operand) is None:  # to compare a dtype casts nothing
                self.visit(operand)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if read := _read_dtype(node):
            self._add(*read)
        elif path := _weight_path(node):
            self._add(path, ReadKind.VALUES)
        elif node.attr not in _FACTS or not _is_weight_or_its_dtype(node.value):
            self.generic_visit(node)

    def _add(self, path: tuple[str, ...], kind: ReadKind) -> None:
        self.reads.append(Read(path, kind, self._guards))


def _weight_path(node: ast.AST) -> tuple[str, ...] | None:
    """`a`, `b` of the expression `self.a.b.weight`; None of any other."""
    if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
        return None
    parts = tuple(_dotted(node.value))
    return parts[1:] if len(parts) > 1 and parts[0] == "self" else None


def _read_dtype(node: ast.AST) -> tuple[tuple[str, ...], ReadKind] | None:
    """What `self.a.weight.dtype` or `next(self.a.parameters()).dtype` asks; None of any other expression."""
    if not (isinstance(node, ast.Attribute) and node.attr == "dtype"):
        return None
    asked = node.value
    if path := _weight_path(asked):
        return path, ReadKind.DTYPE
    if isinstance(asked, ast.Call) and isinstance(asked.func, ast.Name) and asked.func.id == "next" and asked.args:
        listed = asked.args[0]
        if isinstance(listed, ast.Call) and isinstance(listed.func, ast.Attribute) and listed.func.attr == "parameters":
            parts = tuple(_dotted(listed.func.value))
            if parts[0] == "self":
                return parts[1:], ReadKind.FIRST_DTYPE
    return None


def _is_weight_or_its_dtype(node: ast.AST) -> bool:
    if isinstance(node, ast.NamedExpr):
        node = node.value
    return _weight_path(node) is not None or _read_dtype(node) is not None


def _dotted(node: ast.AST) -> Iterator[str]:
    """`self`, `a`, `0`, `b` of the expression `self.a[0].b`; "()" for a part that is no name."""
    if isinstance(node, ast.Attribute):
        yield from _dotted(node.value)
        yield node.attr
    elif isinstance(node, ast.Subscript):
        yield from _dotted(node.value)
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        yield str(index) if isinstance(index, int | str) else ANY
    else:
        yield node.id if isinstance(node, ast.Name) else "()"


class _Unknown(Exception):
    """An expression whose value depends on more than the module."""


def _truth(node: ast.expr, module: Any) -> bool | None:
    """Whether a condition holds in a module; None where that depends on more than its attributes."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        truth = _truth(node.operand, module)
        return None if truth is None else not truth
    if isinstance(node, ast.BoolOp):
        decisive = isinstance(node.op, ast.Or)
        truths = {_truth(value, module) for value in node.values}
        return decisive if decisive in truths else None if None in truths else not decisive
    try:
        return bool(_value(node, module))
    except (_Unknown, AttributeError, TypeError):
        return None


def _value(node: ast.expr, module: Any) -> Any:
    """The value of an expression in a module whose Linear weights are int8."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Name) and node.id == "torch":
        return torch
    if isinstance(node, ast.NamedExpr):
        return _value(node.value, module)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value(element, module) for element in node.elts]
    if isinstance(node, ast.Attribute):
        asked = node.value
        is_dtype_of_weight = node.attr == "dtype" and isinstance(asked, ast.Attribute) and asked.attr == "weight"
        if is_dtype_of_weight and _is_linear(_value(asked.value, module)):  # type: ignore[attr-defined]
            return torch.int8
        return getattr(_value(asked, module), node.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        owner, attribute = (_value(argument, module) for argument in node.args)
        return hasattr(owner, attribute)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        return _COMPARISONS[type(node.ops[0])](left, right)
    raise _Unknown


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
