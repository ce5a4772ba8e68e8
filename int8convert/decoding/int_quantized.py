"""Integers of one byte as compressed-tensors writes them, where they are not the codes of a row scale alone.

`P.weight` I8 [out, in], `P.weight_scale` one, [out, 1] or [out, groups], and `P.weight_zero_point` I8 of the scale's
shape if codes are not symmetric. Symmetric codes with one scale a row are an int8 checkpoint already, which `export`
reads: to quantize them again would lose accuracy and gain nothing.

Source: compressed-tensors 0.20, `IntQuantizationCompressor` and `NaiveQuantizationCompressor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.decoding.blocks import BlockCoding
from int8convert.decoding.coding import CodedWeight, Places, misfit


def find(places: Places, _block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the weights of a checkpoint whose bytes are integers with group scales, one scale, or zero points.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    for name, codes in places.items():
        stored = codes.stored
        scale = places.get(f"{name}_scale") if stored.dtype == "I8" and name.endswith(".weight") else None
        if scale is None or scale.stored.dtype not in NUMPY_DTYPE:
            continue
        zeros, found = places.get(f"{name}_zero_point"), scale.stored.shape
        if zeros is None and found in (stored.shape[:1], (*stored.shape[:1], 1)):
            continue
        if zeros is not None and (zeros.stored.dtype, zeros.stored.shape) != ("I8", found):
            raise misfit(zeros.stored, stored, f"I8 {list(found)}")
        if len(stored.shape) != 2 or min(stored.shape) == 0:
            raise misfit(scale.stored, stored, "a matrix of codes")
        if scale.stored.n_elements == 1:
            block = stored.shape
        elif len(found) == 2 and found[0] == stored.shape[0] and found[1] and stored.shape[1] % found[1] == 0:
            block = (1, stored.shape[1] // found[1])
        elif found == stored.shape[:1]:
            block = (1, stored.shape[1])
        else:
            raise misfit(scale.stored, stored, "one value, one a row, or one for each group of a row")
        yield CodedWeight(name, codes, BlockCoding("I8", scale, (block[0], block[1]), zeros=zeros))
