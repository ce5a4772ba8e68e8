"""Sizes as people write them."""

from __future__ import annotations

import math
import re

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
