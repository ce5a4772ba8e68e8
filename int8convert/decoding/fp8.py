"""FP8 weights: a matrix of F8_E4M3 or F8_E5M2 codes, or one for each expert, and a scale for each block of it.

Whatever the scale is called - `weight_scale_inv` where DeepSeek wrote it, `weight_scale` elsewhere - a weight is code
times scale. The blocks are those that the config names, 128 x 128, 1 x 32 (MXFP8), single rows, or the whole matrix,
which the scale's shape tells. A scale is a float, or a power of two: F8_E8M0, or the same bytes as U8.

With an FP8 block in config.json, codes of a Linear module without a scale are an error: loaders would make the scale
up. So is a scale whose weight is no FP8: a loader multiplies by it, and whether that was done before is not known.
Without such a block codes without a scale are a plain cast, and mean what they say, if no matrix of the checkpoint has
one. Codes of embeddings and of other modules that are not Linear are always a plain cast.

What it does not know: scales under names that no loader has. A neighbour that looks like one is named in the error.

Source: the float8 quantization of transformers, and of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.blocks import BlockCoding, grid_of, is_one_per_matrix
from int8convert.decoding.coding import CodedWeight, Places, misfit
from int8convert.decoding.values import E8M0_DTYPES, Values, fp8_values
from int8convert.errors import CorruptFileError
from int8convert.formats.compressed_tensors import is_ignored
from int8convert.text import quoted

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
METHODS = frozenset({"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt"})
"""Values of `quant_method` in config.json whose weights may be FP8 codes without a scale."""

UNUSED_SUFFIXES = (
    *(".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".qscale_act"),
    *(".input_global_scale", ".input_zero_point", ".input_scale_ub", ".k_zero_point", ".v_zero_point"),
)
"""Ends of the names of scales of activations and caches, which the int8 form does not need."""

_SCALE_WORDS = ("scale", "amax")
"""Words in the names of scales; an amax is a scale times the largest code."""

_SCALE_DTYPES = E8M0_DTYPES | NUMPY_DTYPE.keys()
_DEFAULT_BLOCK = (128, 128)
_MX_BLOCK = (1, 32)


class Fp8Cast:
    """Decodes FP8 codes that have no scale: they are the weights."""

    def __init__(self, dtype: str) -> None:
        self._values = fp8_values(dtype)

    def decode(self, codes: npt.NDArray[np.uint8], first_row: int) -> Values:
        return self._values[codes]


def find(places: Places, block: Mapping[str, Any]) -> Iterator[CodedWeight]:
    """Yield the FP8 weights that have a scale.

    Args:
        block: the quantization block of config.json.

    Raises:
        CorruptFileError: a scale does not fit its weight, or its weight holds no FP8 codes.
    """
    blocks = (*(tuple(_configured_blocks(block)) or (_DEFAULT_BLOCK,)), _MX_BLOCK)
    for name, weight in places.items():
        dtype = weight.stored.dtype
        if dtype not in FP8_DTYPES and dtype not in NUMPY_DTYPE:
            continue
        scale = next((places[scale] for scale in _scale_names(name, block) if scale in places), None)
        if scale is None:
            continue
        if dtype in FP8_DTYPES:
            yield CodedWeight(name, weight, BlockCoding(dtype, scale, _block_of(weight.stored, scale.stored, blocks)))
        elif block and len(weight.stored.shape) == 2 and not _is_left_alone(name, block):
            raise _already_scaled(weight.stored, scale.stored)


def check_unscaled(
    places: Places, block: Mapping[str, Any], scaled: Container[str], is_any_scaled: bool, linears: Container[str]
) -> None:
    """Check that the FP8 matrices without a scale are plain casts.

    Args:
        scaled: names of the weights that have a scale.
        is_any_scaled: whether there are any.
        linears: the weights of Linear modules and of experts, which FP8 loaders replace.

    Raises:
        CorruptFileError: a matrix of a Linear module or of experts has lost its scale.
    """
    unscaled = [
        name
        for name, weight in places.items()
        if weight.stored.dtype in FP8_DTYPES and len(weight.stored.shape) > 1 and name not in scaled and name in linears
    ]
    if unscaled:
        _check_plain(unscaled, places, block, is_any_scaled)


def _scale_names(name: str, block: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a weight's scale. The last two are DeepSeek V4's and Mistral's, which transformers renames."""
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if block.get("quant_method") == "fp8" and name.endswith(".weight"):
        yield f"{name.removesuffix('weight')}scale"
        yield f"{name.removesuffix('weight')}qscale_weight"


def _check_plain(unscaled: list[str], places: Places, block: Mapping[str, Any], is_scaled: bool) -> None:
    """Refuse FP8 matrices without a scale that are no plain casts.

    Args:
        is_scaled: other matrices have one. Whoever cast to FP8 cast the whole checkpoint, or wrote a block that says
            which modules were left out.
    """
    neighbours: dict[str, list[str]] = {}
    for name in places:
        module, _, leaf = name.rpartition(".")
        if any(word in leaf for word in _SCALE_WORDS):
            neighbours.setdefault(module, []).append(name)
    for name in unscaled:
        beside = neighbours.get(name.rpartition(".")[0], []) + neighbours.get(name, [])
        is_plain = not is_scaled and all(other.endswith(UNUSED_SUFFIXES) for other in beside)
        is_cast = _is_left_alone(name, block) if block else is_plain
        if not is_cast:
            there = f"found {', '.join(map(quoted, beside[:3]))}" if beside else "found none"
            weight = places[name].stored
            raise CorruptFileError(
                f"the FP8 matrix {quoted(name)}, {weight.dtype} {list(weight.shape)}, has no scale: expected "
                f"{quoted(f'{name}_scale_inv')} or {quoted(f'{name}_scale')}, {there}",
                "fetch the checkpoint again, or convert its 16-bit version",
            )


def _already_scaled(weight: StoredTensor, scale: StoredTensor) -> CorruptFileError:
    return CorruptFileError(
        f"{quoted(weight.name)} is {weight.dtype}, expected the FP8 codes that {quoted(scale.name)} is the scale of: "
        "whether it was multiplied already is not known",
        "remove the scales if the weights are whole, and quantization_config with them",
    )


def _is_left_alone(name: str, block: Mapping[str, Any]) -> bool:
    """Return whether config.json excludes a weight's module from FP8, so that loaders take it as stored."""
    module = name.rpartition(".")[0]
    names = block.get("modules_to_not_convert")
    listed = [entry for entry in names if isinstance(entry, str)] if isinstance(names, list) else []
    if any(f"{module}.".startswith(f"{entry}.") or module.endswith(f".{entry}") for entry in listed):
        return True
    return is_ignored(module, type("Linear", (), {}), block)  # its keys are those of no other method


def _configured_blocks(block: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the blocks that a config names, as `fp8` and as compressed-tensors do."""
    groups = block.get("config_groups")
    sizes = [block.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            sizes += [weights.get("block_structure"), [1, weights.get("group_size")]]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            yield size[0], size[1]


def _block_of(weight: StoredTensor, scale: StoredTensor, blocks: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    shape, found = weight.shape, scale.shape
    if len(shape) in (2, 3) and scale.dtype in _SCALE_DTYPES and weight.strides is None and scale.strides is None:
        rows, columns = shape[-2:]
        if is_one_per_matrix(found, shape) and (len(shape) == 2 or len(found) in (1, 3)):
            return max(1, rows), max(1, columns)
        if found == (*shape[:-1], 1) or (len(shape) == 2 and found == (rows,)):
            return 1, max(1, columns)
        for block in blocks:
            if found == grid_of(shape, block):
                return block
    elif len(shape) == 2 and scale.dtype in _SCALE_DTYPES and scale.n_elements == 1:
        return max(1, shape[0]), max(1, shape[1])
    named = " or ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(blocks))
    raise misfit(scale, weight, f"one value, one a row, or one for each {named} block")
