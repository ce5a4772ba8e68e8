"""config.json of a conversion: written by `quantize`, and compared by `verify` with what is there."""

from __future__ import annotations

from typing import Any

from int8convert.formats.output_format import OutputFormat
from int8convert.formats.quantization_config import bitsandbytes_config, compressed_tensors_config
from int8convert.planning.plan import ConversionPlan


def converted_config(plan: ConversionPlan, threshold: float) -> dict[str, Any]:
    """Return what `quantize` writes into config.json for a plan."""
    source, found = plan.source.config, plan.model_map
    if found.output_format is OutputFormat.COMPRESSED_TENSORS:
        return compressed_tensors_config(source, found.dtype, found.skip_modules)
    return bitsandbytes_config(source, found.dtype, threshold, found.skip_modules)
