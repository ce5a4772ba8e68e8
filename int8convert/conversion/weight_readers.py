"""Linear weights that a model's own code reads, instead of calling the module: `self.dt_proj.weight @ time_step`.

Such code would get int8 codes where it expects the weight. Mamba's `dt_proj` is one: bitsandbytes makes it int8, and
the model does not run any more.

1. The source of each class in the model is parsed, never run, for `self.<path>.weight` in methods other than set-up.
2. A read under `if self.pretraining_tp > 1:` counts where the module at hand has no value that rules it out.

What it does not know: a weight reached in any other way than by that expression, and conditions on anything but the
module's own attributes.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers.quantizers.base import _assign_is_quantized

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
    "get_",
    "_prune",
    "prune",
)
_FACTS = frozenset({"dtype", "device", "shape", "ndim", "size", "is_meta"})
"""What may be asked of a weight without reading it."""

_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}

_READ = re.compile(r"\bself(\.\w+)+\.weight\b")

Guard = tuple[ast.expr, bool]
"""A condition, and what it must be for the code below it to be reached."""

Read = tuple[str, tuple[Guard, ...]]
"""The path from a module to one whose weight it reads, and the conditions that stands under."""


def modules_with_read_weights(model: Any) -> set[str]:
    """The full names of modules whose `weight` is read by the code of another.

    Does not know training: the model must be in eval mode. Marks it as quantized, as the loader does, which some code
    asks for.
    """
    _assign_is_quantized(model)
    found = set()
    reads = {module_class: list(_reads_of(module_class)) for module_class in {type(m) for m in model.modules()}}
    for name, module in model.named_modules():
        for path, guards in reads[type(module)]:
            if all(_truth(condition, module) in (wanted, None) for condition, wanted in guards):
                found.add(f"{name}.{path}" if name else path)
    return found


def _reads_of(module_class: type) -> Iterator[Read]:
    """What comes between `self.` and `.weight` in the methods of a class and of those it inherits from."""
    for owner in module_class.__mro__:
        if issubclass(owner, nn.Module) and not owner.__module__.startswith(("torch.", "transformers.modeling_utils")):
            yield from _reads_in_file(owner.__module__).get(owner.__name__, ())


@cache
def _reads_in_file(module_name: str) -> dict[str, list[Read]]:
    """Class -> what its methods read, for all classes of a Python module."""
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return {}  # no source, as for a class made at run time: nothing to be learnt from it
    # Parsing takes a second for the largest, and in most there is nothing to find.
    tree = ast.parse(source) if _READ.search(source) else ast.Module([], [])
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            reader = _Reader()
            reader.visit(node)
            found[node.name] = reader.reads
    return found


class _Reader(ast.NodeVisitor):
    """Collects `self.<path>.weight` with the conditions it stands under."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self._guards: tuple[Guard, ...] = ()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not node.name.startswith(_SET_UP):
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

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _FACTS:
            return
        parts = list(_dotted(node))
        if len(parts) > 2 and parts[0] == "self" and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            self.reads.append((".".join(parts[1:-1]), self._guards))
        self.generic_visit(node)


def _dotted(node: ast.AST) -> Iterator[str]:
    """`self`, `a`, `b` of the expression `self.a.b`; something that is no name in place of what is none."""
    if isinstance(node, ast.Attribute):
        yield from _dotted(node.value)
        yield node.attr
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
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, module), node.attr)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
        owner, attribute = (_value(argument, module) for argument in node.args)
        return hasattr(owner, attribute)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = _value(node.left, module), _value(node.comparators[0], module)
        return _COMPARISONS[type(node.ops[0])](left, right)
    raise _Unknown
