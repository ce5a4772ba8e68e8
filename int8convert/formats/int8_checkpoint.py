"""An int8 checkpoint of any format: codes, scales, and the tensors that are not int8.

| | codes, I8 [out, in] | scale | zeros, optional |
|---|---|---|---|
| bitsandbytes | `P.weight` | `P.SCB` [out], the absmax | `P.weight_format` |
| compressed-tensors | `P.weight` | `P.weight_scale` [out, 1] | `P.weight_zero_point` |
| torchao | `P._weight_qdata` | `P._weight_scale` [out, 1] | `P._weight_zero_point` |

The codes mean the same in all three, so one format converts to another without quantizing again. That holds for one
scale a row and no zero point; other variants are refused. Opening a checkpoint reads all its scales, so that a damaged
one is refused before anything is written.

Source: bitsandbytes 0.50, compressed-tensors 0.20, torchao 0.18, as they write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from int8convert.checkpoint.floats import widen_bfloat16
from int8convert.checkpoint.safetensors_file import (
    METADATA_NAME,
    parse_safetensors_header,
    read_safetensors_metadata,
)
from int8convert.checkpoint.source import CheckpointSource, ShardReader, SourceShard, fetch_tensors, reading
from int8convert.checkpoint.stored_tensor import DTYPE_BYTES, StoredTensor
from int8convert.errors import CorruptFileError, SourceError
from int8convert.formats.config import BLOCK, read_format
from int8convert.formats.format import Format, WeightNames
from int8convert.formats.layers import is_conv1d
from int8convert.formats.modules import module_of
from int8convert.text import quoted

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Dtypes a model computes in: name in config.json -> name in safetensors."""

_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_FOREIGN = re.compile(
    r"\.(SCB|weight_format|(weight|input|output|q|k|v)_(scale|scale_inv|global_scale|zero_point|packed|shape|g_idx))$"
    r"|\._weight_"
)
"""Names of tensors of quantized weights. One that belongs to no int8 weight is of a form that is not read."""

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
_FUSED_EXPERTS = re.compile(r"(.*\.experts)\.[^.]+")
_EMBEDDING_NAMES = frozenset({"embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings", "embed_in", "shared"})
"""Names under which no model has a Linear layer. Every other matrix may belong to one."""

_REFETCH = "fetch the checkpoint again, or convert its 16-bit original"


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor and the file it is in."""

    stored: StoredTensor
    shard: SourceShard = field(repr=False)

    @property
    def name(self) -> str:
        return self.stored.name


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """The weight of one module.

    Attributes:
        codes: I8 [out, in], also where the model's own weight is [in, out].
        scale: a float for each row: the absmax in bitsandbytes' format, the scale in the others.
        zeros: a zero point or a format number, all zero; None if there is none.
        is_transposed: whether the model's own weight is [in, out], see `layers.is_conv1d`.
    """

    module_name: str
    codes: PlacedTensor
    scale: PlacedTensor
    zeros: PlacedTensor | None
    is_transposed: bool

    @property
    def parts(self) -> tuple[PlacedTensor, ...]:
        """Its tensors as stored."""
        return (self.codes, self.scale) if self.zeros is None else (self.codes, self.scale, self.zeros)

    @property
    def is_expert(self) -> bool:
        """Whether the module is a numbered expert of a mixture."""
        return _EXPERT.match(self.module_name) is not None


@dataclass(frozen=True, slots=True)
class Int8Checkpoint:
    """An int8 checkpoint to read.

    Attributes:
        items: its weights and its other tensors, in the order of the files; a weight where its codes are.
    """

    source: CheckpointSource
    format: Format
    items: tuple[Int8Weight | PlacedTensor, ...] = field(repr=False)

    @property
    def weights(self) -> list[Int8Weight]:
        return [item for item in self.items if isinstance(item, Int8Weight)]

    @property
    def kept(self) -> list[PlacedTensor]:
        """The tensors that are no part of an int8 weight."""
        return [item for item in self.items if isinstance(item, PlacedTensor)]

    @property
    def dtype(self) -> str:
        """The dtype the model computes in, as config.json spells it."""
        named = self.source.config.get("dtype") or self.source.config.get("torch_dtype")
        if named in tuple(DTYPES):
            return str(named)
        spelled = {stored: name for name, stored in DTYPES.items()}
        return next((spelled[t.stored.dtype] for t in self.kept if t.stored.dtype in spelled), "float16")

    def skip_modules(self) -> list[str]:
        """Return the full names of all modules that a loader might take for int8 Linear layers, and must not.

        Includes all matrices that are not int8; embeddings among them do no harm. Also includes names in config.json
        without a tensor, such as an output head that is tied to the embedding.
        """
        matrices = {
            t.name.removesuffix(".weight")
            for t in self.kept
            if t.name.endswith(".weight") and len(t.stored.shape) == 2 and t.stored.dtype in _FLOAT_DTYPES
        }
        matrices = {name for name in matrices if name.rpartition(".")[2] not in _EMBEDDING_NAMES}
        fused = (_FUSED_EXPERTS.fullmatch(t.name) for t in self.kept if len(t.stored.shape) == 3)
        meant = {name for module_name in matrices for name in _names_for(module_name)}
        unseen = set(module_of(self.format).listed_names(self.source.config[BLOCK])) - meant
        return sorted(matrices | {match[1] for match in fused if match} | unseen)


def _names_for(module_name: str) -> Iterator[str]:
    """Yield the names by which a list may mean a module: its own, its parents', its last parts."""
    parts = module_name.split(".")
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])
        yield ".".join(parts[i:])


def open_int8_checkpoint(source: CheckpointSource) -> Int8Checkpoint:
    """Sort a checkpoint's tensors into int8 weights and others, and check all scales.

    Raises:
        SourceError: it is no int8 checkpoint, or of a kind that cannot be read.
        CorruptFileError: a weight is not whole: a part is missing, has a wrong shape, or is no number.
    """
    found = read_format(source.config, quoted(source.label, 300))
    leaves = module_of(found).NAMES
    tensors = {t.name: PlacedTensor(t, shard) for shard in source.shards for t in shard.tensors}
    weights = {}
    parts: set[str] = set()
    for name, tensor in tensors.items():
        module_name, _, leaf = name.rpartition(".")
        if tensor.stored.dtype == "I8" and leaf == leaves.codes and module_name:
            weights[name] = _find_weight(module_name, leaves.under(module_name), tensors, source)
            parts.update(part.name for part in weights[name].parts)
    others = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, tensor in others.items():
        if tensor.stored.dtype == "I8" or _FOREIGN.search(name):
            raise CorruptFileError(
                f"{quoted(name)} belongs to no int8 weight of a {found} checkpoint with one scale for each row",
                _REFETCH,
            )
    if not weights:
        raise SourceError(
            f"the source holds no int8 weights, although its config.json names {found}",
            "look at it with int8convert inspect",
        )
    _check_values(found, list(weights.values()))
    items = (weights.get(name, tensor) for name, tensor in tensors.items() if name in weights or name in others)
    return Int8Checkpoint(source, found, tuple(items))


def _find_weight(
    module_name: str, names: WeightNames, tensors: Mapping[str, PlacedTensor], source: CheckpointSource
) -> Int8Weight:
    codes, scale, zeros = tensors[names.codes], tensors.get(names.scale), tensors.get(names.zeros)
    if scale is None:
        raise CorruptFileError(f"{quoted(codes.name)} is int8 and has no {quoted(names.scale)} beside it", _REFETCH)
    if len(codes.stored.shape) != 2 or 0 in codes.stored.shape:
        raise CorruptFileError(
            f"{quoted(codes.name)} has shape {list(codes.stored.shape)}, expected two dimensions that are not empty",
            _REFETCH,
        )
    n_rows = codes.stored.shape[0]
    _check_part(scale, n_rows, frozenset(DTYPES.values()))
    if zeros is not None and zeros.stored.shape != ():
        _check_part(zeros, n_rows, frozenset(DTYPE_BYTES))
    for part in (codes, scale, zeros):
        if part is not None and part.stored.strides is not None:
            raise SourceError(
                f"{quoted(part.name)} is stored transposed or with gaps, which export does not read",
                "load the checkpoint and save it as safetensors",
            )
    return Int8Weight(module_name, codes, scale, zeros, is_conv1d(module_name, source.config))


def _check_part(part: PlacedTensor, n_rows: int, dtypes: frozenset[str]) -> None:
    """Refuse a part of a weight that is not one value for each row."""
    stored = part.stored
    if stored.shape not in ((n_rows,), (n_rows, 1)) or stored.dtype not in dtypes:
        raise CorruptFileError(
            f"{quoted(part.name)} is {stored.dtype} {list(stored.shape)}, expected one float for each of {n_rows:,} "
            "rows",
            _REFETCH,
        )


def _check_values(found: Format, weights: Sequence[Int8Weight]) -> None:
    """Check the values of scales and zeros."""
    parts = [part for weight in weights for part in weight.parts[1:]]
    fetch_tensors((part.shard, part.stored) for part in parts)
    with SourceReaders() as readers:
        for weight in weights:
            scale = readers.read_scale(weight.scale)
            is_good = np.isfinite(scale) & (scale >= 0)
            if not is_good.all():
                row = int(np.argmin(is_good))
                raise CorruptFileError(
                    f"{quoted(weight.scale.name)} holds {scale[row]} at row {row:,}, expected a number not below 0",
                    _REFETCH,
                )
            if weight.zeros is not None and readers.read_all(weight.zeros).any():
                raise SourceError(
                    f"{quoted(weight.zeros.name)} is not zero: the weight has a zero point or a layout that only "
                    f"{found} reads",
                    "convert the 16-bit original",
                )


def header_entries(checkpoint: Int8Checkpoint, format: Format) -> dict[str, str]:
    """Return what a format's loader demands in the header of each file that a checkpoint is exported to.

    Raises:
        CorruptFileError: the checkpoint has this format already, and its own headers lack it.
    """
    module = module_of(format)
    if checkpoint.format is format:
        headers = map(_file_metadata, checkpoint.source.shards)
        return module.merged_metadata(headers, [f"{weight.module_name}.weight" for weight in checkpoint.weights])
    tensors = {
        f"{item.module_name}.weight" if isinstance(item, Int8Weight) else item.name: (
            item.codes.stored.shape if isinstance(item, Int8Weight) else None
        )
        for item in checkpoint.items
    }
    return module.file_metadata(tensors, checkpoint.dtype)


def _file_metadata(shard: SourceShard) -> dict[str, str]:
    """Return what the header of a shard says of the file as a whole. On the Hub, the header is read again."""
    if shard.remote is None:
        return read_safetensors_metadata(shard.path)
    reader = shard.open()
    try:
        n_bytes = bytearray(8)
        reader.read_into(memoryview(n_bytes), 0)
        header = bytearray(int.from_bytes(n_bytes, "little"))
        reader.read_into(memoryview(header), len(n_bytes))
    finally:
        reader.close()
    parse_safetensors_header(bytes(header), shard.n_bytes, shard.path.name)
    metadata: dict[str, str] = json.loads(header).get(METADATA_NAME) or {}
    return metadata


class SourceReaders:
    """Reads tensors; opens each shard on its first use. A context manager."""

    def __init__(self) -> None:
        self._opened: dict[Path, ShardReader] = {}

    def __enter__(self) -> SourceReaders:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._opened.values():
            reader.close()

    def read(self, tensor: PlacedTensor, buffer: memoryview, at: int = 0) -> None:
        """Fill the buffer with the bytes of a contiguous tensor from byte `at` of it on."""
        with self.reading(tensor.shard) as reader:
            reader.read_into(buffer, tensor.stored.offset + at)

    @contextmanager
    def reading(self, shard: SourceShard) -> Iterator[ShardReader]:
        """Context with a reader of a shard."""
        with reading(shard.path.name):
            if shard.path not in self._opened:
                self._opened[shard.path] = shard.open()
            yield self._opened[shard.path]

    def read_all(self, tensor: PlacedTensor) -> npt.NDArray[np.uint8]:
        data = np.empty(tensor.stored.n_bytes, np.uint8)
        self.read(tensor, data.data)
        return data

    def read_scale(self, tensor: PlacedTensor) -> npt.NDArray[np.float32]:
        """Return a scale or absmax as float32 [rows]. 16-bit ones are widened, which is exact."""
        data = self.read_all(tensor)
        if tensor.stored.dtype == "BF16":
            return widen_bfloat16(data.view(np.int16))
        return data.view(np.float32 if tensor.stored.dtype == "F32" else np.float16).astype(np.float32)
