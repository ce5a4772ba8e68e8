"""Matches scales to FP8 matrices by name, and lists a checkpoint's tensors as they are after decoding.

With an FP8 block in config.json, codes of a Linear module without a scale are an error: loaders would make the scale
up. So is a scale whose weight is no FP8: a loader multiplies by it, and whether that was done before is not known.
Without such a block codes without a scale are a plain cast, and mean what they say, if no matrix of the checkpoint has
one. Codes of embeddings and of other modules that are not Linear are always a plain cast.

What it does not know: scales under names that no loader has. A neighbour that looks like one is named in the error.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.checkpoint.source import CheckpointSource, SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.fp8 import FP8_DTYPES, Fp8Scale
from int8convert.errors import CorruptFileError
from int8convert.formats.compressed_tensors import is_ignored
from int8convert.text import quoted

_UNUSED_SUFFIXES = (
    *(".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".qscale_act"),
)
"""Ends of the names of scales of activations and caches, which the int8 form does not need."""

_SCALE_WORDS = ("scale", "amax")
"""Words in the names of scales; an amax is a scale times the largest code."""

_DEFAULT_BLOCK = (128, 128)
_NO_BLOCK: Mapping[str, Any] = {}

Places = dict[str, tuple[StoredTensor, SourceShard]]


def find_scales(source: CheckpointSource) -> dict[str, Fp8Scale]:
    """Return weight name -> scale of the FP8 matrices that have one.

    Raises:
        CorruptFileError: a scale does not fit its weight, or its weight holds no FP8 codes.
    """
    places = _places(source)
    block = _quantization_block(source.config)
    size = _block_size(block)
    scales = {}
    for name, (weight, _) in places.items():
        found = next((places[scale] for scale in _scale_names(name, block) if scale in places), None)
        if weight.dtype in FP8_DTYPES:
            if found is not None:
                scales[name] = Fp8Scale(*found, _block_of(weight, found[0], size))
        elif found and block and len(weight.shape) == 2 and not _is_left_alone(name, block):
            raise _already_scaled(weight, found[0])
    return scales


def check_unscaled(source: CheckpointSource, linears: Container[str]) -> None:
    """Check that the FP8 matrices without a scale are plain casts.

    Args:
        linears: the weights of Linear modules and of experts, which FP8 loaders replace.

    Raises:
        CorruptFileError: a matrix of a Linear module or of experts has lost its scale.
    """
    scales = find_scales(source)
    places = _places(source)
    unscaled = [
        name
        for name, (weight, _) in places.items()
        if weight.dtype in FP8_DTYPES and len(weight.shape) > 1 and name not in scales and name in linears
    ]
    if unscaled:
        _check_plain(unscaled, places, _quantization_block(source.config), is_scaled=bool(scales))


def as_loaded(source: CheckpointSource) -> list[StoredTensor]:
    """Return the tensors a model sees: FP8 codes become the bf16 weights they stand for, without their scales."""
    scales = find_scales(source)
    block = _quantization_block(source.config)
    serving = {scale for name in scales for scale in _scale_names(name, block)}
    return [
        replace(tensor, dtype="BF16") if tensor.dtype in FP8_DTYPES else tensor
        for shard in source.shards
        for tensor in shard.tensors
        if not (scales and (tensor.name in serving or tensor.name.endswith(_UNUSED_SUFFIXES)))
    ]


def _places(source: CheckpointSource) -> Places:
    return {tensor.name: (tensor, shard) for shard in source.shards for tensor in shard.tensors}


def _quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    block = config.get("quantization_config")
    return block if isinstance(block, dict) else _NO_BLOCK


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
        is_plain = not is_scaled and all(other.endswith(_UNUSED_SUFFIXES) for other in beside)
        is_cast = _is_left_alone(name, block) if block else is_plain
        if not is_cast:
            there = f"found {', '.join(map(quoted, beside[:3]))}" if beside else "found none"
            weight = places[name][0]
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


def _block_size(block: Mapping[str, Any]) -> tuple[int, int]:
    size = block.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return _DEFAULT_BLOCK


def _block_of(weight: StoredTensor, scale: StoredTensor, configured: tuple[int, int]) -> tuple[int, int]:
    if len(weight.shape) == 2 and (scale.dtype in NUMPY_DTYPE or scale.dtype == "F8_E8M0"):
        rows, columns = weight.shape
        if scale.n_elements == 1:
            return max(1, rows), max(1, columns)
        if scale.shape in ((rows,), (rows, 1)):
            return 1, max(1, columns)
        if scale.shape == tuple(-(-n // size) for n, size in zip(weight.shape, configured, strict=True)):
            return configured
    raise CorruptFileError(
        f"{quoted(scale.name)}, {scale.dtype} {list(scale.shape)}, is no scale for {quoted(weight.name)} of shape "
        f"{list(weight.shape)}: expected one value, one a row, or one for each {configured[0]} x {configured[1]} block",
        "fetch the checkpoint again, or convert its 16-bit version",
    )
