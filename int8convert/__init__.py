"""Turn any Hugging Face checkpoint into an LLM.int8() checkpoint, offline, shard by shard.

    import int8convert
    report = int8convert.quantize("opt-66b/", "opt-66b-int8/")

Importing this package does nothing else: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from int8convert.conversion.export import ExportReport, export
    from int8convert.conversion.plan import ConversionPlan
    from int8convert.conversion.quantize import plan, quantize
    from int8convert.conversion.report import ConversionReport
    from int8convert.errors import Int8ConvertError

__version__ = "0.1.0"

__all__ = [
    "ConversionPlan",
    "ConversionReport",
    "ExportReport",
    "Int8ConvertError",
    "__version__",
    "export",
    "plan",
    "quantize",
]

_HOMES = {
    "ConversionPlan": "int8convert.conversion.plan",
    "ConversionReport": "int8convert.conversion.report",
    "ExportReport": "int8convert.conversion.export",
    "Int8ConvertError": "int8convert.errors",
    "export": "int8convert.conversion.export",
    "plan": "int8convert.conversion.quantize",
    "quantize": "int8convert.conversion.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'int8convert' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
