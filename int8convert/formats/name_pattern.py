"""A stranger's regular expressions for module names, matched in bounded time.

`re` tries one way after the other: `(a|a)*b` on forty letters takes longer than anybody waits, and nothing can stop it.
Here all ways are gone at once, as the set of places in the name that some way has reached, and steps are counted.
Whether a name matches does not depend on the order in which ways are tried, so the answers are those of `re`.

Read: characters, `.`, `\\d` `\\w` `\\s` and their opposites, `[...]`, `^`, `$`, groups, `|`, `*`, `+`, `?`, `{m,n}`.
Left out on purpose, since they need more than places: look-around, back-references, flags, possessive repeats.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

MAX_PATTERN_LENGTH = 500
MAX_DEPTH = 20
"""Of groups in groups."""

MAX_STEPS = 20_000_000
"""Of all matches together: some five seconds. A pattern for each of a thousand modules takes a quarter of it."""

_PLAIN = re.compile(r"\^?[\w.-]*", re.ASCII)
_ATOM = re.compile(r"\\[dDwWsS]|\\[^\w\s]|\[\^?\]?(?:\\[dDwWsS]|\\[^\w\s]|[^\]\\\[])*\]|[^\\\[\](){}*+?|^$]")
_REPEAT = re.compile(r"([*+?]|\{(\d{1,3})(,?)(\d{1,3})?\})\??(?![*+?{])")
_SET_OPERATORS = ("--", "&&", "||", "~~")
"""In `[...]` Python means to give these a meaning one day."""

Places = frozenset[int]
Matcher = Callable[[str, Places], Places]
"""Where in a name one can be behind a part of a pattern, from where one can be before it."""


class PatternRefusedError(ValueError):
    """Why a pattern is not read or not matched."""


class TailPatterns:
    """Patterns for module names or dotted tails of them; the first that matches counts.

    A pattern P matches what `re.match(rf"(.*\\.)?({P})$", name)` matches, which is PEFT's rule.

    Raises:
        PatternRefusedError: a pattern is no regular expression, or uses what is left out here.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._steps_left = MAX_STEPS
        self._matchers = [(pattern, self._compile(pattern)) for pattern in patterns]

    def first_match(self, name: str) -> str | None:
        """The first pattern that matches, or None.

        Raises:
            PatternRefusedError: this and earlier calls together took too many steps.
        """
        return next((pattern for pattern, matches in self._matchers if matches(name)), None)

    def _compile(self, pattern: str) -> Callable[[str], bool]:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise PatternRefusedError(f"it has {len(pattern):,} characters, expected at most {MAX_PATTERN_LENGTH}")
        if _PLAIN.fullmatch(pattern):  # nothing in it can go two ways, so `re` is safe, and faster
            plain = re.compile(rf"(?:.*\.)?(?:{pattern})$")
            return lambda name: self._spend(4) and plain.match(name) is not None
        matcher = _Parser(pattern, self._spend).parse()
        return lambda name: len(name) in matcher(name, _tail_starts(name))

    def _spend(self, n_steps: int) -> bool:
        self._steps_left -= n_steps
        if self._steps_left < 0:
            raise PatternRefusedError("matching it with the names of modules takes too long")
        return True


def _tail_starts(name: str) -> Places:
    return frozenset([0, *(i + 1 for i, character in enumerate(name) if character == ".")])


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str, spend: Callable[[int], bool]) -> None:
        self._pattern = pattern
        self._spend = spend
        self._at = 0
        self._depth = 0

    def parse(self) -> Matcher:
        matcher = self._alternatives()
        if self._at < len(self._pattern):
            raise PatternRefusedError("its brackets do not match")
        return matcher

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _alternatives(self) -> Matcher:
        parts = [self._sequence()]
        while self._next() == "|":
            self._at += 1
            parts.append(self._sequence())
        return lambda name, at: frozenset().union(*(part(name, at) for part in parts))

    def _sequence(self) -> Matcher:
        parts: list[Matcher] = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._item()))

        def matcher(name: str, at: Places) -> Places:
            for part in parts:
                at = part(name, at)
            return at

        return matcher

    def _item(self) -> Matcher:
        character = self._next()
        if character == "(":
            return self._group()
        if character in "^$":
            self._at += 1
            return lambda name, at: at & {0 if character == "^" else len(name)}
        found = _ATOM.match(self._pattern, self._at)
        if found is None or any(operator in found[0] for operator in _SET_OPERATORS):
            raise PatternRefusedError(f"it holds {self._pattern[self._at : self._at + 2]!r}, which is not read here")
        self._at = found.end()
        try:
            atom = re.compile(found[0])
        except re.error as error:
            raise PatternRefusedError(str(error)) from None
        return self._character(atom)

    def _character(self, atom: re.Pattern[str]) -> Matcher:
        def matcher(name: str, at: Places) -> Places:
            self._spend(1 + len(at))
            return frozenset(i + 1 for i in at if i < len(name) and atom.match(name[i]))

        return matcher

    def _group(self) -> Matcher:
        self._at += 1
        if self._next() == "?":
            if not self._pattern.startswith("?:", self._at):
                raise PatternRefusedError(
                    f"it holds {'(' + self._pattern[self._at : self._at + 2]!r}, which is not read here"
                )
            self._at += 2
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternRefusedError(f"its groups are nested more than {MAX_DEPTH} levels deep")
        matcher = self._alternatives()
        if self._next() != ")":
            raise PatternRefusedError("its brackets do not match")
        self._at += 1
        self._depth -= 1
        return matcher

    def _repeated(self, part: Matcher) -> Matcher:
        found = _REPEAT.match(self._pattern, self._at)
        if found is None:
            if self._next() and self._next() in "*+?{":
                raise PatternRefusedError(
                    f"it repeats by {self._pattern[self._at : self._at + 4]!r}, which is not read here"
                )
            return part
        self._at = found.end()
        match found[1], found[3]:
            case ("*", _):
                least, most = 0, None
            case ("+", _):
                least, most = 1, None
            case ("?", _):
                least, most = 0, 1
            case (_, ","):
                least, most = int(found[2]), int(found[4]) if found[4] else None
            case _:
                least = most = int(found[2] + (found[4] or ""))
        return lambda name, at: self._repeat(part, least, most, name, at)

    def _repeat(self, part: Matcher, least: int, most: int | None, name: str, at: Places) -> Places:
        for _ in range(least):
            self._spend(1)
            at = part(name, at)
        reached = fresh = at
        n = least
        while fresh and (most is None or n < most):
            self._spend(1)
            fresh = part(name, fresh) - reached
            reached |= fresh
            n += 1
        return reached
