"""The formats of int8 checkpoints, and the types in which their modules answer.

Each format is one module of this package. `modules.module_of` gives it, and `modules.FormatModule` says what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TensorSpecs = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape), in the order of the bytes."""

Difference = tuple[str, str, str]
"""An entry of config.json: its name, what was expected, what was found."""


class Format(StrEnum):
    """A way to write int8 weights, by the name config.json gives it as `quant_method`."""

    BITSANDBYTES = "bitsandbytes"
    COMPRESSED_TENSORS = "compressed-tensors"
    TORCHAO = "torchao"


DEFAULT_FORMAT = Format.BITSANDBYTES
QUANTIZE_FORMATS = (Format.BITSANDBYTES, Format.COMPRESSED_TENSORS)
"""The formats that `quantize` writes; `export` writes all of them."""


def quantize_format(name: str) -> Format:
    """Return the format of a name, if `quantize` writes it.

    Raises:
        ValueError: it does not.
    """
    if name not in QUANTIZE_FORMATS:
        raise ValueError(f"format must be one of {', '.join(QUANTIZE_FORMATS)}, not {name!r}")
    return Format(name)


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names of the tensors of one int8 weight.

    Attributes:
        codes: I8 [out, in].
        scale: one float for each row.
        zeros: a zero point or a layout number. It holds nothing but zeros, and may be missing.
    """

    codes: str
    scale: str
    zeros: str

    def under(self, module_name: str) -> WeightNames:
        """Return the full names in a module."""
        return WeightNames(*(f"{module_name}.{leaf}" for leaf in (self.codes, self.scale, self.zeros)))
