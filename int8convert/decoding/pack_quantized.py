"""Integers of 2 to 8 bits as compressed-tensors packs them: W4A16, W8A16, Kimi-K2's experts.

`P.weight_packed` I32 [out, words], `P.weight_scale` [out, groups] or [out, 1], `P.weight_shape` I64 [2], and
`P.weight_zero_point` I32 [words, groups] if codes are not symmetric. The config tells bits and group size; where it
has several groups of modules, or one scale for a row, the stored shape tells the columns.

Source: compressed-tensors 0.20, `PackedQuantizationCompressor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.checkpoint.source import fetch_tensors
from int8convert.decoding.coding import CodedWeight, Places, misfit
from int8convert.decoding.packed import PackedCoding
from int8convert.decoding.scale import read_scale
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted

_SUFFIX = ".weight_packed"
_MAX_COLUMNS = 1 << 31


def find(places: Places, block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the packed weights of a checkpoint. Reads stored shapes where config.json does not tell them.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    packed = {name: codes for name, codes in places.items() if name.endswith(_SUFFIX) and codes.stored.dtype == "I32"}
    forms = _forms(block)
    stated = {name: places.get(f"{name.removesuffix('_packed')}_shape") for name in packed}
    is_known = len(forms) == 1 and min(forms)[1] > 0
    if not is_known:
        fetch_tensors((shape.shard, shape.stored) for shape in stated.values() if shape is not None)
    for name, codes in packed.items():
        stem = name.removesuffix("_packed")
        scale, shape = places.get(f"{stem}_scale"), stated[name]
        if scale is None or shape is None or shape.stored.dtype != "I64" or shape.stored.shape != (2,):
            lacking = f"{stem}_scale" if scale is None else f"{stem}_shape"
            raise CorruptFileError(
                f"the packed weight {quoted(name)} has no {quoted(lacking)}, by which its codes are read",
                "fetch the checkpoint again, or convert its 16-bit version",
            )
        if f"{stem}_g_idx" in places:
            raise CorruptFileError(
                f"{quoted(f'{stem}_g_idx')} reorders the inputs of a packed weight: no loader reads that any more, "
                "and each weight would get another group's scale",
                "convert the 16-bit version of the checkpoint",
            )
        n_columns = None if is_known else int(read_scale(shape).view(np.int64)[1])
        yield _weight(codes, scale, places.get(f"{stem}_zero_point"), shape, forms, n_columns)


def _weight(
    codes: PlacedTensor,
    scale: PlacedTensor,
    zeros: PlacedTensor | None,
    stated: PlacedTensor,
    forms: frozenset[tuple[int, int]],
    n_columns: int | None,
) -> CodedWeight:
    found, stored = scale.stored.shape, codes.stored
    if len(stored.shape) == 2 and scale.stored.dtype in NUMPY_DTYPE and found and found[0] == stored.shape[0] > 0:
        n_rows, n_words = stored.shape
        n_groups = found[1] if len(found) == 2 else 1
        for bits, group in sorted(forms):
            columns = n_groups * group if n_columns is None else n_columns
            is_whole = group in (-1, columns) and n_groups == 1
            fits = 0 < columns < _MAX_COLUMNS and (is_whole or n_groups * group == columns)
            if fits and len(found) <= 2 and n_words == -(-columns * bits // 32):
                if zeros is not None and zeros.stored.shape != (-(-n_rows * bits // 32), n_groups):
                    raise misfit(zeros.stored, stored, f"{[-(-n_rows * bits // 32), n_groups]}")
                if zeros is not None and zeros.stored.dtype != "I32":
                    raise misfit(zeros.stored, stored, "packed zero points, I32")
                coding = PackedCoding(bits, columns, scale, zeros, stated_shape=stated)
                return CodedWeight(stored.name.removesuffix("_packed"), codes, coding)
    named = " or ".join(f"{bits} bits in groups of {group}" for bits, group in sorted(forms)) or "no bits"
    raise misfit(scale.stored, stored, f"what config.json names: {named}")


def _forms(block: Mapping[str, Any]) -> frozenset[tuple[int, int]]:
    """Return bits and group size of the integers that a config names; the size is -1 for whole rows."""
    forms = set()
    groups = block.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits, size = (weights.get("num_bits"), weights.get("group_size")) if isinstance(weights, dict) else (None, None)
        if type(bits) is int and 2 <= bits <= 8 and (size is None or (type(size) is int and 0 < size < _MAX_COLUMNS)):
            forms.add((bits, size or -1))
        elif type(bits) is int and 2 <= bits <= 8 and size == -1:
            forms.add((bits, -1))
    return frozenset(forms)
