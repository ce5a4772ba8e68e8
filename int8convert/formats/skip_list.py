"""The list of modules that a quantization block tells transformers to leave alone.

transformers matches each entry with a module's name as a prefix up to a dot, as a suffix, and as a regular expression.
A stranger's expression may run forever, so a list that is read may hold plain names only.

Source: transformers/quantizers/quantizers_utils.py, `should_convert_module`, version 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from int8convert.errors import SourceError
from int8convert.text import quoted

MAX_LISTED, MAX_NAME_LENGTH = 20_000, 500
"""Names in a list, and characters of a name. A list that names each projection of each expert has some thousands."""

_MODULE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_HINT = "name the modules in full: transformers would take this for a regular expression"


def listed_names(entries: Any) -> tuple[str, ...]:
    """Return the plain names in a list; the output head where there is no list, as loaders do."""
    if not isinstance(entries, list):
        return ("lm_head",)
    return tuple(name for name in entries if isinstance(name, str) and _MODULE_NAME.fullmatch(name))


def is_named(module_name: str, names: Iterable[str]) -> bool:
    """Return whether a plain name is a module's prefix up to a dot, or its suffix."""
    return any(f"{module_name}.".startswith(f"{name}.") or module_name.endswith(name) for name in names)


def covered(module_names: Iterable[str], listed: Iterable[str]) -> set[str]:
    """Return the modules that transformers leaves alone, by its own function."""
    from int8convert.transformers_internals import should_convert_module

    entries = list(listed)
    return {name for name in module_names if not should_convert_module(name, entries)}


def loader_rule(model: Any, block: Mapping[str, Any], key: str) -> Callable[[str], bool]:
    """Return transformers' rule for a checkpoint: module name -> whether it is left alone.

    Args:
        model: of transformers; its class decides where the block has no list.

    Raises:
        SourceError: the list is not one of at most MAX_LISTED plain names.
    """
    from transformers.quantizers import HfQuantizer

    from int8convert.transformers_internals import kept_in_fp32, should_convert_module

    names = checked_names(block, key)
    own = HfQuantizer.get_modules_to_not_convert(model, None if names is None else [], kept_in_fp32(model))
    is_skipped = plain_rule(names or [])
    return lambda name: is_skipped(name) or not should_convert_module(name, own)


def checked_names(block: Mapping[str, Any], key: str) -> list[str] | None:
    """Return the names in a block's list; None where it has none.

    Raises:
        SourceError: the list is not one of at most MAX_LISTED plain names.
    """
    names = block.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or len(names) > MAX_LISTED:
        found = f"{len(names):,} entries" if isinstance(names, list) else shown(names)
        raise SourceError(
            f"{key} in config.json is {found}, expected a list of up to {MAX_LISTED:,} names of modules", _HINT
        )
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH or not _MODULE_NAME.fullmatch(name):
            raise SourceError(f"{key} in config.json holds {shown(name)}, expected the name of a module", _HINT)
    return names


def plain_rule(names: list[str]) -> Callable[[str], bool]:
    """Return `covered` for plain names, as one expression in place of one for each name."""
    if not names:
        return lambda name: False
    beginning = re.compile(rf"(?:{'|'.join(names)})(?:(?<=\.)|(?=\.|$))")
    return lambda name: beginning.match(name) is not None or name.endswith(tuple(names))


def shown(value: Any) -> str:
    """Return an untrusted value in a few characters."""
    return quoted(value, 40) if isinstance(value, str) else quoted(repr(value), 40)[1:-1]
