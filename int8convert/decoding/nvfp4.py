"""NVFP4 weights: 4-bit floats, an FP8 scale for each 16 of a row, and a float for the whole matrix.

| | compressed-tensors | ModelOpt |
|---|---|---|
| codes, U8 [out, in / 2] | `P.weight_packed` | `P.weight` |
| scale, F8_E4M3 [out, in / 16] | `P.weight_scale` | `P.weight_scale` |
| float | `P.weight_global_scale`: scales are divided by it | `P.weight_scale_2`: they are multiplied by it |

The quotient or the product is rounded to float32 before it multiplies a code, as both libraries do. ModelOpt's fused
experts are [experts, out, ..], with one float for each expert.

Source: compressed-tensors 0.20, `NVFP4PackedCompressor`; ModelOpt 0.47, `NVFP4QTensor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from int8convert.decoding.blocks import FP4, BlockCoding
from int8convert.decoding.coding import CodedWeight, Places, misfit
from int8convert.errors import CorruptFileError
from int8convert.text import quoted

GROUP = 16
_GROUP_BYTES = GROUP // 2
_FLOATS = {".weight_packed": ("weight_global_scale", True), ".weight": ("weight_scale_2", False)}
"""Ending of the codes' name -> name of the float, and whether scales are divided by it."""


def find(places: Places, _block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the NVFP4 weights of a checkpoint.

    Raises:
        CorruptFileError: a scale does not fit its codes, or the matrix has no float.
    """
    for name, codes in places.items():
        module, _, leaf = name.rpartition(".")
        scale = places.get(f"{module}.weight_scale") if codes.stored.dtype == "U8" and f".{leaf}" in _FLOATS else None
        if scale is None or scale.stored.dtype != "F8_E4M3":
            continue
        shape = codes.stored.shape
        expected = (*shape[:-1], shape[-1] // _GROUP_BYTES) if shape else ()
        if len(shape) not in (2, 3) or shape[-1] % _GROUP_BYTES or scale.stored.shape != expected:
            raise misfit(scale.stored, codes.stored, f"{list(expected)}")
        float_leaf, divides = _FLOATS[f".{leaf}"]
        factor = places.get(f"{module}.{float_leaf}")
        if factor is None:
            raise CorruptFileError(
                f"the NVFP4 weight {quoted(name)} has no {quoted(f'{module}.{float_leaf}')}: its scales would be off "
                "by a factor of thousands",
                "fetch the checkpoint again, or convert its 16-bit version",
            )
        if factor.stored.dtype != "F32" or factor.stored.n_elements not in (1, prod(shape[:-2])):
            raise misfit(factor.stored, codes.stored, "one F32 for each matrix")
        coding = BlockCoding(FP4, scale, (1, GROUP), factor, divides)
        yield CodedWeight(f"{module}.weight", codes, coding)
