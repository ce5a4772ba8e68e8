"""A stranger's regular expressions for module names, matched by RE2 in time linear in the name.

`re` tries one way after the other: `(a|a)*b` on forty letters runs for hours, and nothing can stop it. RE2 has no
look-around, no back-references and no possessive repeats; expressions with them are refused. The answers are those of
`re` for ASCII names: RE2's `\\d`, `\\w` and `\\s` match ASCII only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache

import re2

MAX_PATTERN_LENGTH = 500
"""Characters of a pattern."""

MAX_PATTERNS = 4000
"""Patterns in one list, and compiled ones that are remembered. Adapters may name each module by one."""

MAX_MEMORY = 1 << 20
"""Bytes that RE2 may use for one pattern."""

_READ_DIFFERENTLY = re.compile(r"\{,|\[[^\]]*(?:\[|--|&&|\|\||~~)")
"""`{,n}` is a repeat to `re` and text to RE2; `[[:alpha:]]` is a class to RE2 alone."""


class PatternRefusedError(ValueError):
    """Why a pattern is not matched."""


class TailPatterns:
    """Patterns for module names or dotted tails of them; the first that matches counts.

    A pattern P matches what `re.match(rf"(.*\\.)?({P})$", name)` matches, which is PEFT's rule.

    Raises:
        PatternRefusedError: a pattern is invalid, or RE2 cannot match it.

    Source: peft/utils/other.py, `get_pattern_key`, version 0.19.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = list(patterns)
        if len(patterns) > MAX_PATTERNS:
            raise PatternRefusedError(f"there are {len(patterns):,} patterns, expected at most {MAX_PATTERNS:,}")
        self._compiled = [(pattern, _compile(pattern, rf"(?:.*\.)?(?:{pattern})$")) for pattern in patterns]

    def first_match(self, name: str) -> str | None:
        """Return the first pattern that matches a name, or None."""
        return next((pattern for pattern, compiled in self._compiled if compiled.match(name)), None)


def matches_start(pattern: str, name: str) -> bool:
    """Return whether `re.match(pattern, name)` matches, which is the rule of compressed-tensors.

    Raises:
        PatternRefusedError: the pattern is invalid, or RE2 cannot match it.

    Source: compressed_tensors/utils/match.py, version 0.20.
    """
    return _compile(pattern, pattern).match(name) is not None


@cache
def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = MAX_MEMORY
    options.log_errors = False
    return options


@lru_cache(maxsize=MAX_PATTERNS)
def _compile(pattern: str, expression: str) -> re2._Regexp:
    """Compile an expression made of a stranger's pattern."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PatternRefusedError(f"it has {len(pattern):,} characters, expected at most {MAX_PATTERN_LENGTH}")
    if _READ_DIFFERENTLY.search(pattern):
        raise PatternRefusedError("it holds a set or a repeat that engines read differently")
    try:
        re.compile(expression)
        return re2.compile(expression, options=_options())
    except (re.error, RecursionError, OverflowError, UnicodeEncodeError) as error:
        raise PatternRefusedError(f"it is no regular expression: {error}") from None
    except re2.error as error:
        reason = error.args[0]
        raise PatternRefusedError(
            reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        ) from None
