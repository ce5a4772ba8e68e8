"""Numbers in messages agree with their nouns."""

from __future__ import annotations

import pytest

from int8convert.text import counted


@pytest.mark.parametrize(("n", "shown"), [(0, "0 exports"), (1, "1 export"), (2, "2 exports"), (3600, "3,600 exports")])
def test_one_is_singular_and_thousands_are_grouped(n: int, shown: str) -> None:
    assert counted(n, "export") == shown
