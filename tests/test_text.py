"""Words for sizes, counts and times."""

from __future__ import annotations

from int8convert.text import format_bytes, format_count, format_percent, format_seconds


def test_sizes_have_three_digits_and_a_unit() -> None:
    assert [format_bytes(n) for n in (999, 1000, 12_345_678, 65_700_000_000)] == ["999 B", "1 kB", "12.3 MB", "65.7 GB"]
    assert [format_count(n) for n in (999, 1000, 125_200_000, 65_700_000_000)] == ["999", "1 k", "125 M", "65.7 B"]
    assert format_percent(0.98765) == "98.8 %"


def test_times_have_the_unit_a_reader_wants() -> None:
    assert [format_seconds(s) for s in (0.05, 99.94, 3599.6, 7260)] == ["0.1 s", "99.9 s", "1 h 0 min", "2 h 1 min"]
