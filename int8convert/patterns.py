"""Patterns by which a user names modules and tensors: `--skip`, `--only`, `--allow-missing`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern with `*`, `?` and `[...]` matches a full name or a dotted tail of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def is_allowed(tensor_name: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a tensor's name or that of its module."""
    module_name = tensor_name.rpartition(".")[0]
    return any(matches(tensor_name, pattern) or matches(module_name, pattern) for pattern in patterns)
