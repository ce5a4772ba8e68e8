"""MXFP4 weights: 4-bit floats, and a power of two for each 32 of a row.

| codes | scale | who writes it |
|---|---|---|
| `P_blocks` U8 [experts, out, in / 32, 16] | `P_scales` U8 [experts, out, in / 32] | gpt-oss |
| `P.weight_packed` U8 [out, in / 2] | `P.weight_scale` U8 [out, in / 32] | compressed-tensors |
| `P.weight` U8 or I8 [out, in / 2] | `P.weight_scale` or `P.scale`, U8 or F8_E8M0 [out, in / 32] | others |

The others are ModelOpt, Quark and DeepSeek V4. Theirs may be [experts, out, ..], and Quark's scale may have a row for
several of the codes'. The low half of a byte is the even column. I8 codes of full width are not these: their scale is
no power of two for each 16 bytes.

Source: transformers 5.24, `convert_moe_packed_tensors`; compressed-tensors 0.20; vLLM's loaders of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.blocks import FP4, BlockCoding
from int8convert.decoding.coding import CodedWeight, Places, flattened, misfit
from int8convert.decoding.values import E8M0_DTYPES
from int8convert.formats.int8_checkpoint import PlacedTensor

GROUP = 32
_GROUP_BYTES = GROUP // 2


def find(places: Places, _block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the MXFP4 weights of a checkpoint.

    Raises:
        CorruptFileError: a scale does not fit its codes.
    """
    for name, codes in places.items():
        stored = codes.stored
        if name.endswith("_blocks") and stored.dtype == "U8":
            scale = places.get(f"{name.removesuffix('_blocks')}_scales")
            if scale is None or scale.stored.dtype != "U8":
                continue
            if len(stored.shape) != 4 or scale.stored.shape != stored.shape[:3] or stored.shape[3] != _GROUP_BYTES:
                expected = f"{list(stored.shape[:3])} and {_GROUP_BYTES} bytes of codes a value"
                raise misfit(scale.stored, stored, expected)
            # gpt-oss holds its 16-bit experts as [experts, in, out].
            coding = BlockCoding(FP4, scale, (1, GROUP))
            yield CodedWeight(name.removesuffix("_blocks"), flattened(codes, 3), coding, is_transposed=True)
        elif stored.dtype in ("U8", "I8") and name.endswith((".weight", ".weight_packed")):
            scale = _scale_of(name, places)
            if scale is not None:
                coding = BlockCoding(FP4, scale, _block_of(stored, scale.stored))
                yield CodedWeight(name.removesuffix("_packed"), codes, coding)


def _scale_of(name: str, places: Places) -> PlacedTensor | None:
    """Return the scale of codes, if it consists of powers of two; None otherwise."""
    module = name.rpartition(".")[0]
    leaves = ("weight_scale", "scale") if name.endswith(".weight") else ("weight_scale",)
    for leaf in leaves:
        scale = places.get(f"{module}.{leaf}")
        if scale is not None and scale.stored.dtype in E8M0_DTYPES:
            return scale
    return None


def _block_of(codes: StoredTensor, scale: StoredTensor) -> tuple[int, int]:
    shape, found = codes.shape, scale.shape
    expected = (*shape[:-1], shape[-1] // _GROUP_BYTES) if shape else ()
    if len(shape) in (2, 3) and len(found) == len(shape) and shape[-1] % _GROUP_BYTES == 0 and min(found) > 0:
        rows = shape[-2] // found[-2]
        if (*found[:-2], found[-2] * rows, found[-1]) == expected:
            return rows, GROUP
    raise misfit(scale, codes, f"{list(expected)}")
