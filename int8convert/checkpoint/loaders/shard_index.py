"""Compares an index of shards with what the shards hold.

Loaders take file names from the index, and all tensors from those files. They ignore where the index puts a tensor. So
a difference alone does not stop a conversion:

- *absent*: no file holds the tensor. `planning.needs` decides whether the model needs it.
- *moved*: another file that the index names holds the tensor. It is read from there.
- *repeated*: several files hold the tensor. transformers takes it from the last file in the order of the names,
  whatever the index says. vLLM does the same, but sorts numbers in the names as numbers.

Source: transformers 5.24, `get_checkpoint_shard_files` and `_load_pretrained_model`; vLLM, `_natural_sort_key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from int8convert.checkpoint.stored_tensor import StoredTensor
from int8convert.text import quoted

if TYPE_CHECKING:
    from int8convert.checkpoint.source import SourceShard


def build_index(weight_map: Mapping[str, str], n_bytes: int, n_parameters: int) -> dict[str, Any]:
    """Return the content of `model.safetensors.index.json`.

    Args:
        weight_map: tensor name -> file name.
        n_bytes: bytes of all tensors.
    """
    return {
        "metadata": {"total_parameters": n_parameters, "total_size": n_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }


_COMPARED_BYTES = 1 << 30
"""Most bytes of repeated tensors that are compared, so that repeated tensors cannot delay the plan."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RepeatedTensor:
    """A tensor that several shards hold.

    Attributes:
        places: each shard and the tensor in it, in the order in which transformers reads them; the last one counts.
    """

    places: tuple[tuple[SourceShard, StoredTensor], ...]

    @property
    def name(self) -> str:
        return self.places[-1][1].name

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(shard.path.name for shard, _ in self.places)

    @property
    def taken_by_vllm(self) -> str:
        """The file from which vLLM takes the tensor."""
        return max(self.files, key=_natural_order)

    @property
    def n_bytes(self) -> int:
        return sum(stored.n_bytes for _, stored in self.places)

    def is_equal(self) -> bool | None:
        """Return whether all places hold the same bytes; None if that would need a download or a rearrangement."""
        (_, last), others = self.places[-1], self.places[:-1]
        if any((stored.dtype, stored.shape) != (last.dtype, last.shape) for _, stored in others):
            return False
        if any(shard.remote is not None or stored.strides is not None for shard, stored in self.places):
            return None
        return all(_same_bytes(self.places[-1], other) for other in others)


@dataclass(frozen=True, slots=True)
class IndexDifferences:
    """The differences between an index and its shards.

    Attributes:
        absent: tensor name -> file the index names, of tensors that no shard holds.
        moved: tensor name -> the file the index names, and the file that holds it.
        repeated: tensors that several shards hold.
    """

    absent: Mapping[str, str]
    moved: Mapping[str, tuple[str, str]]
    repeated: tuple[RepeatedTensor, ...]

    def notes(self) -> Iterator[str]:
        """Yield notes on moved and repeated tensors, one for each kind."""
        if self.moved:
            name, (said, found) = next(iter(self.moved.items()))
            yield (
                f"the index puts {quoted(name)}{_and_more(len(self.moved))} into {quoted(said)}, and {quoted(found)} "
                "holds it: it is read from there, as loaders do"
            )
        if self.repeated:
            yield self._repeated_note()

    def _repeated_note(self) -> str:
        first = self.repeated[0]
        *others, last = map(quoted, first.files)
        others_too = _and_more(len(self.repeated))
        taken = f"{quoted(first.name)}{others_too} is in {', '.join(others)} and in {last}: that of {last} is taken, as"
        equal = self._all_equal()
        if equal:
            return f"{taken} transformers does; their bytes are equal"
        differs = "which differ" if equal is False else "which were not compared"
        elsewhere = next((r for r in self.repeated if r.taken_by_vllm != r.files[-1]), None)
        if elsewhere is None:
            return f"{taken} transformers and vLLM do of the two, {differs}"
        return (
            f"{taken} transformers does of the two, {differs}; "
            f"vLLM takes {quoted(elsewhere.name)} from {quoted(elsewhere.taken_by_vllm)}"
        )

    def _all_equal(self) -> bool | None:
        """Return whether all repeated tensors are equal; None if unknown."""
        if sum(repeated.n_bytes for repeated in self.repeated) > _COMPARED_BYTES:
            return None
        answers = [repeated.is_equal() for repeated in self.repeated]
        return False if False in answers else None if None in answers else True


AS_INDEXED = IndexDifferences({}, {}, ())
"""No difference, or no index."""


def compare_index(
    weight_map: Mapping[str, str], shards: Sequence[SourceShard]
) -> tuple[tuple[SourceShard, ...], IndexDifferences]:
    """Compare an index with its shards, and keep in the shards the tensors that loaders take.

    Args:
        weight_map: tensor name -> file name.
        shards: every file the index names, in the order of the names.

    Returns:
        the shards, each tensor in the last one that holds it, and the differences. Tensors that the index does not
        name are kept, because loaders read whole shards.
    """
    places: dict[str, list[tuple[SourceShard, StoredTensor]]] = {}
    for shard in shards:
        for stored in shard.tensors:
            places.setdefault(stored.name, []).append((shard, stored))
    file_of = {name: found[-1][0].path.name for name, found in places.items()}
    repeated = tuple(RepeatedTensor(tuple(found)) for found in places.values() if len(found) > 1)
    differences = IndexDifferences(
        absent={name: said for name, said in weight_map.items() if name not in places},
        moved={
            name: (said, file_of[name])
            for name, said in weight_map.items()
            if name in places and said not in {shard.path.name for shard, _ in places[name]}
        },
        repeated=repeated,
    )
    if not repeated:
        return tuple(shards), differences
    kept = (tuple(t for t in shard.tensors if file_of[t.name] == shard.path.name) for shard in shards)
    return tuple(replace(shard, tensors=left) for shard, left in zip(shards, kept, strict=True)), differences


def _natural_order(file_name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file_name)]


def _same_bytes(one: tuple[SourceShard, StoredTensor], other: tuple[SourceShard, StoredTensor]) -> bool:
    (shard, stored), (other_shard, other_stored) = one, other
    reader, other_reader = shard.open(), other_shard.open()
    left, right = bytearray(_BLOCK_BYTES), bytearray(_BLOCK_BYTES)
    try:
        for begin in range(0, stored.n_bytes, _BLOCK_BYTES):
            n = min(_BLOCK_BYTES, stored.n_bytes - begin)
            reader.read_into(memoryview(left)[:n], stored.offset + begin)
            other_reader.read_into(memoryview(right)[:n], other_stored.offset + begin)
            if left[:n] != right[:n]:
                return False
        return True
    finally:
        reader.close()
        other_reader.close()


def _and_more(n: int) -> str:
    return f" (and {n - 1:,} more)" if n > 1 else ""
