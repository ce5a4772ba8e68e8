"""Inspects a checkpoint by its headers and config alone: tensors by pattern, dtypes, share of int8."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from int8convert.checkpoint.manifest import Manifest
from int8convert.checkpoint.source import CheckpointSource
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.decoding.source_weights import find_weights
from int8convert.formats.format import Format
from int8convert.formats.modules import endings_beside
from int8convert.sources import open_source
from int8convert.text import quoted

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_SCALE_SUFFIXES = endings_beside(Format)
_MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that differ in their layer number only.

    Attributes:
        pattern: the name with `*` for the numbers.
        dtype, shape: those of each tensor.
        n_tensors, n_bytes: those of all tensors together.
        reason: why they are not int8, as the conversion recorded; "" if they are, or nothing is known.
    """

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    n_tensors: int
    n_bytes: int
    reason: str = ""

    @property
    def n_elements(self) -> int:
        return self.n_tensors * prod(self.shape)

    @property
    def is_scale(self) -> bool:
        """The tensors belong to the int8 form of others, and are no parameters."""
        return self.pattern.endswith(_SCALE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A summary of a checkpoint.

    Attributes:
        architectures: the model classes that config.json names.
        quant_method: the layout that config.json names; None if it names none.
        threshold: magnitude from which input features are multiplied in 16 bits; None if config.json has none.
        skip_modules: the modules that config.json tells loaders to leave alone.
        n_parameters: elements of all tensors but scales.
        n_int8_parameters: those of them in int8.
        n_parameters_by_format: name of a low-bit format -> elements of the weights that are stored in it.
        commit: the commit of a repository on the Hub; None for a directory.
    """

    path: str
    architectures: tuple[str, ...]
    quant_method: str | None
    threshold: float | None
    skip_modules: tuple[str, ...]
    n_shards: int
    n_tensors: int
    n_bytes: int
    n_parameters: int
    n_int8_parameters: int
    n_tensors_by_dtype: dict[str, int]
    groups: tuple[TensorGroup, ...]
    n_parameters_by_format: dict[str, int]
    commit: str | None = None

    @property
    def coverage(self) -> float:
        """Share of the parameters in int8, 0 to 1."""
        return self.n_int8_parameters / max(1, self.n_parameters)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the files, scales included, for each parameter."""
        return 8 * self.n_bytes / max(1, self.n_parameters)

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self), "coverage": self.coverage, "bits_per_parameter": self.bits_per_parameter}


def inspect(path: str | os.PathLike[str], revision: str | None = None, manifest: Manifest | None = None) -> Inspection:
    """Inspect a source or an output, in a directory or on the Hub.

    Args:
        revision: the repository's branch, tag or commit.
        manifest: the record of why tensors stayed 16-bit; None takes the one beside the checkpoint, if any.

    Raises:
        Int8ConvertError: there is no checkpoint, or it is broken.
    """
    return inspect_source(open_source(path, revision, ignores_adapter=True), manifest)


def inspect_source(source: CheckpointSource, manifest: Manifest | None = None) -> Inspection:
    """Inspect a checkpoint that is open already. See `inspect`."""
    tensors = list(source.tensors)
    low_bit = find_weights(source)
    parameters = [
        tensor
        for tensor in tensors
        if tensor.name in low_bit.by_codes
        or not (tensor.name.endswith(_SCALE_SUFFIXES) or low_bit.is_dropped(tensor.name))
    ]
    by_format: Counter[str] = Counter()
    for name, format_name in low_bit.formats.items():
        by_format[format_name] += prod(low_bit.by_codes[name].shape)
    block = source.config.get("quantization_config")
    block = block if isinstance(block, dict) else {}
    method = block.get("quant_method")
    return Inspection(
        path=source.label,
        architectures=_strings(source.config.get("architectures")),
        quant_method=_clean(method) if isinstance(method, str) else None,
        threshold=_finite(block.get("llm_int8_threshold")),
        skip_modules=_strings(block.get("llm_int8_skip_modules") or block.get("ignore")),
        n_shards=len(source.shards),
        n_tensors=len(tensors),
        n_bytes=source.n_bytes,
        n_parameters=sum(low_bit.as_loaded(tensor).n_elements for tensor in parameters),
        n_int8_parameters=sum(
            tensor.n_elements for tensor in parameters if tensor.dtype == "I8" and tensor.name not in low_bit.by_codes
        ),
        n_tensors_by_dtype=dict(Counter(tensor.dtype for tensor in tensors).most_common()),
        groups=_group(tensors, _reasons(manifest or Manifest(source.directory))),
        n_parameters_by_format=dict(by_format.most_common()),
        commit=source.commit,
    )


def _finite(value: Any) -> float | None:
    """Return a number that float32 can hold; None for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 3e38 else None


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(_clean(item) for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _clean(text: str) -> str:
    """Return text of a stranger's config for printing: quoted unless it is short and printable."""
    return text if text.isprintable() and len(text) <= _MAX_TEXT else quoted(text, _MAX_TEXT)


def _reasons(manifest: Manifest) -> dict[str, str]:
    """Return tensor name -> reason why it is not int8, from the manifest; {} without one."""
    if not manifest.is_complete:
        return {}
    return {
        name: _clean(record.reason)
        for shard in manifest.read_records().values()
        for name, record in shard.tensors.items()
        if isinstance(record.reason, str)
    }


def _group(tensors: list[StoredTensor], reasons: dict[str, str]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str, tuple[int, ...], str], list[StoredTensor]] = {}
    for tensor in tensors:
        key = (_NUMBER.sub("*", tensor.name), tensor.dtype, tensor.shape, reasons.get(tensor.name, ""))
        groups.setdefault(key, []).append(tensor)
    return tuple(
        TensorGroup(pattern, dtype, shape, len(members), sum(member.n_bytes for member in members), reason)
        for (pattern, dtype, shape, reason), members in sorted(groups.items())
    )
