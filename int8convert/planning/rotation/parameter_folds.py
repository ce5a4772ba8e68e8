"""The folds of a rotation, parameter by parameter, in the names of the model.

With h the residual stream, R its rotation, g and b gain and bias of a norm n, W and c weight and bias of a layer:

    embeddings   E R                        their rows are h
    readers      W diag(g) R                they get R n(h) / g instead of n(h)
    norms        gain 1, bias R (b / g)     R keeps the mean, so a LayerNorm of R h is R times that of h
    writers      R W, bias R c              they add R times what they added
    values       W_v -> S W_v, W_o -> W_o S in blocks within a head; so the attention's result is S times what it was
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from int8convert.planning.rotation.groups import Groups, hidden_size, in_features, out_features

MAX_BLOCK = 256
"""Largest rotated block. A block of rows has to be in memory at once, for each thread."""

MIN_BLOCK = 16
"""Smallest block that is worth rotating."""


@dataclass(frozen=True, slots=True)
class ParameterFold:
    """What is done to one parameter; see `fold.Fold`, whose rows are the outputs of a layer here.

    Attributes:
        gain: name of the norm whose gain multiplies the columns, or divides the rows; "" for none.
        offset: of that norm.
    """

    parameter: str
    gain: str = ""
    offset: float = 0.0
    divides: bool = False
    row_block: int = 1
    column_block: int = 1
    constant: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rotation_block(size: int) -> int:
    """Return the largest block, a power of 4, that divides a size; less than `MIN_BLOCK` if there is none."""
    block = 1
    while block < MAX_BLOCK and size % (4 * block) == 0:
        block *= 4
    return block


def residual_folds(groups: Groups, model: Any) -> Iterator[ParameterFold]:
    """Yield the folds of a rotation of the residual stream."""
    block = rotation_block(hidden_size(model))
    for name in groups.embeddings:
        yield ParameterFold(f"{name}.weight", column_block=block)
    for group in groups.norms:
        for name in group.readers:
            yield ParameterFold(f"{name}.weight", group.norm, group.offset, column_block=block)
        if getattr(model.get_submodule(group.norm), "bias", None) is not None:
            yield ParameterFold(f"{group.norm}.bias", group.norm, group.offset, divides=True, row_block=block)
        yield ParameterFold(f"{group.norm}.weight", constant=1 - group.offset)
    for name in groups.writers:
        yield ParameterFold(f"{name}.weight", row_block=block)
        if model.get_submodule(name).bias is not None:
            yield ParameterFold(f"{name}.bias", row_block=block)


def value_folds(pairs: Iterable[tuple[str, str]], model: Any) -> Iterator[ParameterFold]:
    """Yield the folds of a rotation of the values of every head.

    Args:
        pairs: layers of values and of outputs.
    """
    size = head_size(model)
    block = rotation_block(size)
    for value, output in pairs:
        first, second = model.get_submodule(value), model.get_submodule(output)
        if block < MIN_BLOCK or out_features(first) % size or in_features(second) % size:
            continue
        yield ParameterFold(f"{value}.weight", row_block=block)
        if first.bias is not None:
            yield ParameterFold(f"{value}.bias", row_block=block)
        yield ParameterFold(f"{output}.weight", column_block=block)


def head_size(model: Any) -> int:
    """Return the size of a head, as the config says it."""
    config = model.config.get_text_config()
    stated = getattr(config, "head_dim", None)
    return int(stated or hidden_size(model) // max(1, getattr(config, "num_attention_heads", 1)))


def merged(first: ParameterFold, second: ParameterFold) -> ParameterFold:
    """Return both folds of one parameter as one: one of its rows, the other of its columns."""
    return ParameterFold(
        first.parameter,
        first.gain or second.gain,
        max(first.offset, second.offset),
        first.divides or second.divides,
        max(first.row_block, second.row_block),
        max(first.column_block, second.column_block),
    )


def merge(folds: Iterable[ParameterFold]) -> dict[str, ParameterFold]:
    """Return parameter -> its fold."""
    found: dict[str, ParameterFold] = {}
    for fold in folds:
        before = found.get(fold.parameter)
        found[fold.parameter] = merged(before, fold) if before else fold
    return found
