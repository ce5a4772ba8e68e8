"""The low-bit weights of a checkpoint, whatever formats they are stored in, and its tensors as they are after decoding.

The only place that lists the formats. Reads headers and config.json, no weights.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from int8convert.checkpoint.floats import NUMPY_DTYPE
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding import awq, bitsandbytes_4bit, fp8, gptq, int_quantized, mxfp4, nvfp4, pack_quantized
from int8convert.decoding.coding import CodedWeight, Places, is_contiguous, quantization_block
from int8convert.decoding.fp8 import FP8_DTYPES, METHODS, UNUSED_SUFFIXES
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.text import quoted

FORMATS = {
    "FP8": fp8,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
    "pack-quantized": pack_quantized,
    "int-quantized": int_quantized,
    "GPTQ": gptq,
    "AWQ": awq,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
}
"""Name of a format -> its module, with a function `find`."""

_CODE_SUFFIXES = (".weight", ".weight_packed", ".qweight", "_blocks")


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """The low-bit weights of a checkpoint.

    Attributes:
        by_codes: name of the codes -> the weight.
        formats: name of the codes -> name of the format.
        consumed: names of all tensors that are codes, or decoded with them.
    """

    places: Places = field(repr=False)
    by_codes: Mapping[str, CodedWeight] = field(repr=False)
    formats: Mapping[str, str] = field(repr=False)
    consumed: frozenset[str] = field(repr=False)

    def is_dropped(self, name: str) -> bool:
        """Return whether a tensor is not written: it is decoded with codes, or scales activations."""
        if not self.by_codes or name in self.by_codes:
            return False
        return name in self.consumed or name.endswith(UNUSED_SUFFIXES)

    def as_loaded(self, stored: StoredTensor) -> StoredTensor:
        """Return a tensor as a 16-bit checkpoint of the model has it."""
        weight = self.by_codes.get(stored.name)
        if weight is not None:
            return replace(stored, name=weight.name, dtype="BF16", shape=weight.shape, strides=None)
        return replace(stored, dtype="BF16") if stored.dtype in FP8_DTYPES else stored


def find_weights(source: CheckpointSource) -> SourceWeights:
    """Find the low-bit weights of a checkpoint. The last answer is kept: a plan asks several times.

    Raises:
        CorruptFileError: the tensors of one do not fit together.
    """
    if not (_LAST and _LAST[0][0] is source):
        _LAST[:] = [(source, _find(source))]
    return _LAST[0][1]


_LAST: list[tuple[CheckpointSource, SourceWeights]] = []


def _find(source: CheckpointSource) -> SourceWeights:
    places = {t.name: PlacedTensor(t, shard) for shard in source.shards for t in shard.tensors}
    block = quantization_block(source.config)
    by_codes: dict[str, CodedWeight] = {}
    formats: dict[str, str] = {}
    names: set[str] = set()
    consumed: set[str] = set()
    for format_name, module in FORMATS.items():
        for weight in module.find(places, block):
            parts = weight.names
            _check_unique(weight, parts, places, names, by_codes)
            names.add(weight.name)
            by_codes[parts[0]] = weight
            formats[parts[0]] = format_name
            consumed.update(parts)
    return SourceWeights(places, by_codes, formats, frozenset(consumed))


def check_unscaled(source: CheckpointSource, linears: Container[str]) -> None:
    """Check that FP8 matrices without a scale are plain casts; see `fp8.check_unscaled`."""
    found = find_weights(source)
    block = quantization_block(source.config)
    fp8.check_unscaled(found.places, block, found.by_codes, "FP8" in found.formats.values(), linears)


def as_loaded(source: CheckpointSource) -> list[StoredTensor]:
    """Return the tensors a model sees: codes become the bf16 weights they stand for, without what is beside them."""
    found = find_weights(source)
    return [found.as_loaded(tensor) for tensor in source.tensors if not found.is_dropped(tensor.name)]


def is_decodable(source: CheckpointSource) -> bool:
    """Return whether a checkpoint holds low-bit weights, and all of them are decoded here."""
    found = find_weights(source)
    method = quantization_block(source.config).get("quant_method")
    weights = [t for t in source.tensors if t.name.endswith(_CODE_SUFFIXES)]
    is_cast = isinstance(method, str) and method in METHODS and any(t.dtype in FP8_DTYPES for t in weights)
    known = FP8_DTYPES | NUMPY_DTYPE.keys()
    return bool(found.by_codes or is_cast) and all(t.dtype in known or t.name in found.by_codes for t in weights)


def _check_unique(
    weight: CodedWeight,
    parts: tuple[str, ...],
    places: Places,
    names: set[str],
    by_codes: Mapping[str, CodedWeight],
) -> None:
    """Refuse a weight that is there twice, or that does not lie in one piece."""
    is_twice = weight.name in names or weight.codes.name in by_codes
    if is_twice or (weight.name != weight.codes.name and weight.name in places):
        raise CorruptFileError(
            f"the weight {quoted(weight.name)} is there twice, quantized as {quoted(weight.codes.name)}",
            "remove one of them, or fetch the checkpoint again",
        )
    if not all(is_contiguous(places[name]) for name in parts):
        raise CorruptFileError(
            f"the quantized weight {quoted(weight.codes.name)} is not contiguous in its file",
            "save the checkpoint as safetensors",
        )
