"""GPTQ weights of 2, 3, 4 or 8 bits: packed along the inputs, so that a row of the weight is a column of its tensors.

`P.qweight` I32 [in * bits / 32, out], `P.qzeros` I32 [groups, out * bits / 32], `P.scales` [groups, out], and `P.g_idx`
I32 [in], the group of each input, if groups are not contiguous. Version 1 stores zero points minus one, within the
bits of each; version 2 as they are. Bits are those that the shapes give, as modules may differ.

Memory: rows are gathered from all of `qweight`. A stream from the Hub holds one `qweight` at a time.

Source: GPTQModel 7.7, `TorchLinear`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.decoding.coding import CodedWeight, Places, misfit, weights_by_column
from int8convert.decoding.packed import PackedCoding
from int8convert.formats.int8_checkpoint import PlacedTensor

METHODS = frozenset({"gptq", "auto-round", "autoround"})
_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> what is added to stored zero points."""

_BITS = (2, 3, 4, 8)


def find(places: Places, block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the GPTQ weights of a checkpoint whose config names a packing that is read here.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    version = str(block.get("checkpoint_format") or block.get("format") or "gptq")
    packing = block.get("packing_format") or "auto_round:auto_gptq"
    is_read = packing in ("auto_round:auto_gptq", "gptq") and not block.get("is_marlin_format")
    if str(block.get("quant_method")) not in METHODS or version not in _VERSIONS or not is_read:
        return
    for module, codes, scale, zeros in weights_by_column(places):
        yield _weight(module, codes, scale, zeros, places.get(f"{module}.g_idx"), block, _VERSIONS[version])


def _weight(
    module: str,
    codes: PlacedTensor,
    scale: PlacedTensor,
    zeros: PlacedTensor,
    group_of: PlacedTensor | None,
    block: Mapping[str, Any],
    zero_step: int,
) -> CodedWeight:
    stored, found = codes.stored, scale.stored.shape
    if len(stored.shape) == 2 and len(found) == 2 and scale.stored.dtype in NUMPY_DTYPE and min(found) > 0:
        n_words, n_out = stored.shape
        n_groups = found[0]
        for bits in _BITS:
            n_in = n_words * 32 // bits
            fits = n_words * 32 % bits == 0 and found[1] == n_out and n_in % n_groups == 0
            is_zeros = zeros.stored.dtype == "I32" and zeros.stored.shape == (n_groups, n_out * bits // 32)
            if fits and is_zeros and n_out * bits % 32 == 0 and _is_width(n_in, n_groups, bits, group_of, block):
                by_rows = replace(stored, shape=(n_out, n_words), strides=(1, n_out))
                coding = PackedCoding(bits, n_in, scale, zeros, zero_step, True, group_of)
                return CodedWeight(f"{module}.weight", replace(codes, stored=by_rows), coding)
    raise misfit(scale.stored, stored, "scales [groups, out] and zero points of 2, 3, 4 or 8 bits")


def _is_width(n_in: int, n_groups: int, bits: int, group_of: PlacedTensor | None, block: Mapping[str, Any]) -> bool:
    """Return whether a weight has so many columns: by the groups of its inputs, else by the config."""
    if group_of is not None:
        return (group_of.stored.dtype, group_of.stored.shape) == ("I32", (n_in,))
    size: Any = block.get("group_size")
    if block.get("bits") != bits or type(size) is not int or not (size == -1 or size > 0):
        return False
    return n_groups == (1 if size == -1 else -(-n_in // size))
