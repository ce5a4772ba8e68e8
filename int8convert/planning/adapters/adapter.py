"""Reads a PEFT LoRA adapter's directory: the modules it changes by low-rank matrices, and the tensors it replaces.

1. Check adapter_config.json (`adapter_config`).
2. Read the header of adapter_model.safetensors, or of adapter_model.bin, as one more shard.
3. Sort the tensors by name: `base_model.model.<module>.lora_A.weight` and the like are matrices. Any other name is a
   whole tensor of the model, which PEFT saves for `modules_to_save`, trained biases and resized embeddings.

Reads no weights. An adapter is as untrusted as a checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from int8convert.checkpoint.directory import read_shard
from int8convert.checkpoint.hashing import file_sha256
from int8convert.checkpoint.json_file import read_config
from int8convert.checkpoint.names import find_file
from int8convert.checkpoint.source import SourceShard
from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.errors import AdapterError
from int8convert.planning.adapters.adapter_config import MERGE_WITH_PEFT, AdapterConfig, parse_adapter_config
from int8convert.text import quoted

ADAPTER_CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of an adapter's weight file, in the order in which PEFT prefers them."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_PREFIX = "base_model.model."
_REFETCH = "fetch the adapter again"
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>magnitude_vector)(?:\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """An adapter's addition to one module's weight: scaling * B @ A.

    Attributes:
        a: [rank, in]; for an embedding [rank, tokens].
        b: [out, rank]; for an embedding [features, rank].
        magnitude: [out], the length to which DoRA scales each row; None without DoRA.
        is_embedding: the weight is [tokens, features], the transpose of B @ A.
    """

    module_name: str
    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None
    scaling: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape: [out, in], or [tokens, features]."""
        out, columns = self.b.shape[0], self.a.shape[1]
        return (columns, out) if self.is_embedding else (out, columns)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter to merge.

    Attributes:
        replacements: parameter name -> the tensor that replaces it, before any update is added.
    """

    label: str
    directory: Path
    config: AdapterConfig = field(repr=False)
    shard: SourceShard = field(repr=False)
    updates: Mapping[str, LowRankUpdate] = field(repr=False)
    replacements: Mapping[str, StoredTensor] = field(repr=False)

    def identity(self) -> dict[str, str]:
        """Return file name -> sha256 of both files. Reads each once."""
        return {
            ADAPTER_CONFIG_NAME: file_sha256(self.directory / ADAPTER_CONFIG_NAME),
            self.shard.path.name: file_sha256(self.shard.path, self.shard.identity),
        }


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's config and header; no weights.

    Raises:
        AdapterError: no such directory, no adapter in it, or one that cannot be merged here.
        SourceError: a name leads to no file, or out of the directory.
        CorruptFileError: a file contradicts itself.
    """
    directory = Path(path)
    try:
        return _open_directory(directory, str(path))
    except OSError as error:
        raise AdapterError(
            f"the adapter {quoted(str(path), 300)} cannot be read: {error.strerror}",
            "check that you may read the directory and that its disk works",
        ) from error


def _open_directory(directory: Path, label: str) -> Adapter:
    config_path = find_file(directory, ADAPTER_CONFIG_NAME) if directory.is_dir() else None
    weight_path = next((found for name in WEIGHT_NAMES if (found := find_file(directory, name))), None)
    if config_path is None or weight_path is None:
        missing = ADAPTER_CONFIG_NAME if config_path is None else " or ".join(WEIGHT_NAMES)
        raise AdapterError(
            f"{quoted(label, 300)} is not a LoRA adapter: it has no {missing}",
            "give the directory that PEFT's save_pretrained wrote",
        )
    config = parse_adapter_config(read_config(config_path))
    shard = read_shard(weight_path)
    lora: dict[str, dict[str, StoredTensor]] = {}
    replacements = {}
    for tensor, name in _model_names(shard):
        key = _LORA_KEY.fullmatch(name)
        if key is not None:
            kind = key["linear"] or (key["embedding"] and f"embedding_{key['embedding']}") or "magnitude"
            lora.setdefault(key["module"], {})[kind] = tensor
        else:
            replacements[_parameter_name(tensor, name)] = tensor
    updates = {module: _update(module, tensors, config) for module, tensors in lora.items()}
    for parameter, tensor in replacements.items():
        if parameter.removesuffix(".weight") in updates and ".base_layer." not in tensor.name:
            raise AdapterError(
                f"the adapter both changes and replaces {quoted(parameter)}: PEFT would not load {quoted(tensor.name)}",
                _REFETCH,
            )
    if not updates and not replacements:
        raise AdapterError(f"the adapter {quoted(label, 300)} holds no tensors", _REFETCH)
    return Adapter(label, directory, config, shard, updates, replacements)


def _model_names(shard: SourceShard) -> Iterator[tuple[StoredTensor, str]]:
    """Yield the tensors and their names without PEFT's prefix."""
    for tensor in shard.tensors:
        name = tensor.name.removeprefix(_PREFIX)
        if name == tensor.name:
            raise AdapterError(
                f"the adapter's tensor {quoted(name)} has a name that does not begin with '{_PREFIX}'",
                "save the adapter with PEFT's save_pretrained",
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"the adapter's tensor {quoted(name)} has dtype {tensor.dtype}, expected one of "
                f"{', '.join(sorted(FLOAT_DTYPES))}",
                "save the adapter in float32 or the dtype of its model",
            )
        yield tensor, name


def _parameter_name(tensor: StoredTensor, name: str) -> str:
    """Return the parameter that a whole tensor replaces. In a changed module, PEFT's name has `base_layer`."""
    parts = name.split(".")
    if len(parts) > 2 and parts[-2] == "base_layer":
        del parts[-2]
    if any(part.startswith("lora_") or part in ("base_layer", "modules_to_save", "token_adapter") for part in parts):
        raise AdapterError(
            f"the adapter's tensor {quoted(tensor.name)} is of a kind that int8convert does not merge",
            MERGE_WITH_PEFT,
        )
    return ".".join(parts)


def _update(module: str, tensors: Mapping[str, StoredTensor], config: AdapterConfig) -> LowRankUpdate:
    shown = quoted(module)
    is_embedding = "embedding_A" in tensors or "embedding_B" in tensors
    a_name, b_name = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    expected = {a_name, b_name} | ({"magnitude"} if config.is_dora else set())
    if set(tensors) != expected:
        raise AdapterError(
            f"the adapter has for {shown} {_listed(set(tensors))}, expected {_listed(expected)}", _REFETCH
        )
    if is_embedding and config.is_dora:
        raise AdapterError(
            f"the adapter uses DoRA on the embedding {shown}, which needs the lengths of whole columns",
            MERGE_WITH_PEFT,
        )
    if not config.targets(module):
        raise AdapterError(
            f"the adapter has matrices for {shown}, which is not among the target_modules of {ADAPTER_CONFIG_NAME}",
            "fetch both files again; PEFT would leave the matrices out",
        )
    a, b, magnitude = tensors[a_name], tensors[b_name], tensors.get("magnitude")
    _check_shapes(shown, a, b, magnitude, config.rank_of(module))
    return LowRankUpdate(module, a, b, magnitude, config.scaling_of(module), is_embedding)


def _check_shapes(shown: str, a: StoredTensor, b: StoredTensor, magnitude: StoredTensor | None, rank: int) -> None:
    if len(a.shape) > 2 or len(b.shape) > 2:
        raise AdapterError(
            f"the adapter changes the convolution {shown}: A is {list(a.shape)}, expected a matrix", MERGE_WITH_PEFT
        )
    # A rank above both sides of the weight adds nothing, and memory without end in a file that takes no room.
    if not (
        (len(a.shape), len(b.shape), a.shape[0], b.shape[-1]) == (2, 2, rank, rank)
        and min(a.shape[1], b.shape[0]) > 0
        and max(a.shape[1], b.shape[0]) >= rank
    ):
        raise AdapterError(
            f"the adapter's matrices for {shown} are A {list(a.shape)} and B {list(b.shape)}, expected [{rank}, in] "
            f"and [out, {rank}], with in or out at least {rank}",
            "fetch the adapter again; these may be parts that were not gathered before saving",
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise AdapterError(
            f"the adapter's magnitudes for {shown} are {list(magnitude.shape)}, expected {list(b.shape[:1])}", _REFETCH
        )
    for tensor in (a, b, magnitude):
        if tensor is not None and tensor.span_bytes > tensor.n_bytes:
            raise AdapterError(
                f"the adapter's tensor {quoted(tensor.name)} is not contiguous in its file",
                "save the adapter in safetensors",
            )


def _listed(kinds: set[str]) -> str:
    return " and ".join(f"lora_{kind}" for kind in sorted(kinds))
