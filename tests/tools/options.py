"""`quantize` with its planning options as loose keywords, for helpers of tests that pass options on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import int8convert

_PLAN_OPTIONS = {field.name for field in fields(int8convert.PlanOptions)}


def quantize(src: str | Path, out: Path, **options: Any) -> int8convert.ConversionReport:
    """Convert silently, unless `on_event` is given."""
    planned = {name: options.pop(name) for name in _PLAN_OPTIONS & options.keys()}
    return int8convert.quantize(src, out, int8convert.PlanOptions(**planned), **{"on_event": print_nothing, **options})


def print_nothing(event: object) -> None:
    """Receive an event and do nothing."""
