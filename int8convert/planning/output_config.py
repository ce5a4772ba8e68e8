"""The config.json of a conversion, which `quantize` writes and `verify` compares."""

from __future__ import annotations

from typing import Any

from int8convert.formats.config import int8_config
from int8convert.planning.plan import ConversionPlan

DEFAULT_THRESHOLD = 6.0
"""Feature dimensions with a magnitude at or above it stay 16-bit: LLM.int8(), arXiv:2208.07339, Sec. 3.2."""


def converted_config(plan: ConversionPlan, threshold: float) -> dict[str, Any]:
    found = plan.model_map
    return int8_config(plan.source.config, found.output_format, found.dtype, found.skip_modules, threshold)
