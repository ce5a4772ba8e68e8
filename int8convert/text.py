"""Words for numbers, and safe forms of strangers' names: text that people read in messages and results.

A checkpoint is a stranger's. Its names are printed by `quoted`, which lets no control character through.
"""

from __future__ import annotations

import math
import re

_UNITS_OF_TIME = ((3600, "hour"), (60, "minute"), (1, "second"))
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(size: int | str | None) -> int | None:
    """Return the bytes of a size such as 2000000, "5GB" (10^9) or "5GiB" (2^30); None for None.

    Raises:
        ValueError: it is not a size.
    """
    if size is None:
        return None
    match = _SIZE.fullmatch(str(size).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"a size must look like 5GB or 500MiB, not {size!r}")
    number, prefix, binary = match.groups()
    unit: int = (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
    return math.ceil(float(number) * unit)


def printable(text: str) -> str:
    """Return text on one line: each character that does not print, such as that of an escape sequence, is escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(text: str, max_length: int = 100) -> str:
    """Return a stranger's text between quotes, on one line: what does not print is escaped, what is long is cut."""
    shown = repr(text[: max_length + 1])
    return shown if len(shown) <= max_length else shown[: max_length - 4] + "...'"


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: "1 file", "2,000 files". For nouns whose plural ends in s."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def format_bytes(n: float) -> str:
    """Return bytes in decimal units, three digits: 2.63 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5 or (unit == "B" and n < 1000):
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB" if n < 1000 else f"{n:,.0f} TB"


def format_count(n: float) -> str:
    """Return a number of parameters in three digits: 1.32 B."""
    for unit in ("", " k", " M", " B"):
        if abs(n) < 999.5:
            return f"{n:.0f}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def format_percent(share: float) -> str:
    """Return a share, 0 to 1, as 12.3 %."""
    return f"{100 * share:.1f} %"


def format_rest(seconds: float) -> str:
    """Return an estimated time in one unit: about 40 seconds left, about 3 minutes left, about 2 hours left."""
    if seconds < 1:
        return "less than a second left"
    unit, noun = next(((unit, noun) for unit, noun in _UNITS_OF_TIME if seconds >= 1.5 * unit), (1, "second"))
    return f"about {counted(round(seconds / unit), noun)} left"


def format_seconds(seconds: float) -> str:
    """Return a time as 1.5 s, 2 min 5 s, or 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
