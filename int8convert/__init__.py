"""Turn any Hugging Face checkpoint into an LLM.int8() checkpoint, offline, shard by shard.

    import int8convert
    report = int8convert.quantize("opt-66b/", "opt-66b-int8/")
    model = int8convert.load("opt-66b-int8/")

Importing this package does nothing else: names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from int8convert.calibration.calibrate import calibrate
    from int8convert.calibration.folder import Calibration, read_calibration
    from int8convert.conversion.export import ExportReport, export
    from int8convert.conversion.quantize import quantize
    from int8convert.conversion.readers import Reading
    from int8convert.conversion.report import ConversionReport
    from int8convert.errors import Int8ConvertError
    from int8convert.outliers.find import OutlierReport, find_outliers
    from int8convert.outliers.in_memory import choose_outliers
    from int8convert.outliers.keep import keep_budget
    from int8convert.outliers.store import store_outliers
    from int8convert.planning.plan import ConversionPlan
    from int8convert.planning.plan_checkpoint import PlanOptions, plan
    from int8convert.publish.upload import UploadReport, upload
    from int8convert.publish.verify_command import Gates
    from int8convert.runtime.generate import GenerationReport, Sampling, generate
    from int8convert.runtime.in_memory import quantize_
    from int8convert.runtime.linear import Int8Linear
    from int8convert.runtime.load import load
    from int8convert.runtime.text.texts import Text
    from int8convert.runtime.transformers_plugin import Int8ConvertConfig
    from int8convert.verification.options import Execution, Tasks
    from int8convert.verification.verify import verify
    from int8convert.verification.verify_report import VerifyReport

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ConversionPlan",
    "ConversionReport",
    "Execution",
    "ExportReport",
    "Gates",
    "GenerationReport",
    "Int8ConvertConfig",
    "Int8ConvertError",
    "Int8Linear",
    "OutlierReport",
    "PlanOptions",
    "Reading",
    "Sampling",
    "Tasks",
    "Text",
    "UploadReport",
    "VerifyReport",
    "__version__",
    "calibrate",
    "choose_outliers",
    "export",
    "find_outliers",
    "generate",
    "keep_budget",
    "load",
    "plan",
    "quantize",
    "quantize_",
    "read_calibration",
    "store_outliers",
    "upload",
    "verify",
]

_HOMES = {
    "Calibration": "int8convert.calibration.folder",
    "ConversionPlan": "int8convert.planning.plan",
    "ConversionReport": "int8convert.conversion.report",
    "Execution": "int8convert.verification.options",
    "ExportReport": "int8convert.conversion.export",
    "Gates": "int8convert.publish.verify_json",
    "GenerationReport": "int8convert.runtime.generate",
    "Int8ConvertConfig": "int8convert.runtime.transformers_plugin",
    "Int8ConvertError": "int8convert.errors",
    "Int8Linear": "int8convert.runtime.linear",
    "OutlierReport": "int8convert.outliers.find",
    "PlanOptions": "int8convert.planning.plan_checkpoint",
    "Reading": "int8convert.conversion.readers",
    "Sampling": "int8convert.runtime.generate",
    "Tasks": "int8convert.verification.options",
    "Text": "int8convert.runtime.text.texts",
    "UploadReport": "int8convert.publish.upload",
    "VerifyReport": "int8convert.verification.verify_report",
    "calibrate": "int8convert.calibration.calibrate",
    "choose_outliers": "int8convert.outliers.in_memory",
    "export": "int8convert.conversion.export",
    "find_outliers": "int8convert.outliers.find",
    "generate": "int8convert.runtime.generate",
    "keep_budget": "int8convert.outliers.keep",
    "load": "int8convert.runtime.load",
    "plan": "int8convert.planning.plan_checkpoint",
    "quantize": "int8convert.conversion.quantize",
    "quantize_": "int8convert.runtime.in_memory",
    "read_calibration": "int8convert.calibration.folder",
    "store_outliers": "int8convert.outliers.store",
    "upload": "int8convert.publish.upload",
    "verify": "int8convert.verification.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'int8convert' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
