"""Pieces of Markdown made of somebody else's words."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~])")
_MAX_LENGTH = 300


def plain(text: str, keep_marks: bool = False, max_length: int = _MAX_LENGTH) -> str:
    """Text on one line that means nothing to Markdown or HTML.

    Args:
        keep_marks: for inside a block of code, where only its end means anything.
        max_length: what is longer is cut.
    """
    line = "".join(character if character.isprintable() else " " for character in text)[:max_length]
    if keep_marks:
        return line.replace("```", "` ` `")
    return _MARKS.sub(r"\\\1", line)


def code(text: str) -> str:
    """Text as code in a line."""
    return f"`{plain(text, keep_marks=True).replace('`', chr(39)) or ' '}`"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left."""
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(_line([plain(cell) for cell in row]) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.1f} %"


def size(n_bytes: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.3g} {unit}"
    return f"{n_bytes} bytes"


def count(n: int) -> str:
    """A number of parameters."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.3g} {unit}"
    return f"{n}"
