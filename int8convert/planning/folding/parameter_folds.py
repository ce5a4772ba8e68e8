"""The folds of rotations and of smoothing, parameter by parameter, in the names of the model.

With h the residual stream, R its rotation, g and b gain and bias of a norm n, W and c weight and bias of a layer:

    embeddings   E R                        their rows are h
    readers      W diag(g) R                they get R n(h) / g instead of n(h)
    norms        gain 1, bias R (b / g)     R keeps the mean, so a LayerNorm of R h is R times that of h
    writers      R W, bias R c              they add R times what they added
    values       W_v -> S W_v, W_o -> W_o S in blocks within a head; so the attention's result is S times what it was
    smoothing    g / s, b / s or W_1 / s, c_1 / s; W diag(s) for all readers; see `planning.smoothing`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from int8convert.planning.folding.groups import Groups, hidden_size, sizes_of
from int8convert.planning.smoothing import SmoothGroup

MAX_BLOCK = 256
"""Largest rotated block. A block of rows has to be in memory at once, for each thread."""

MIN_BLOCK = 16
"""Smallest block that is worth rotating."""


@dataclass(frozen=True, slots=True)
class ParameterFold:
    """What is done to one parameter; see `fold.Fold`, whose rows are the outputs of a layer here.

    Attributes:
        gain: name of the norm whose gain multiplies the columns, or divides the rows; "" for none.
        offset: of that norm, or of the norm whose weight the parameter is.
        row_factors, column_factors: name of the smoothed group whose factors divide the rows, or multiply the columns;
            "" for none.
        head: size of the heads whose factors repeat where several heads of queries share one of values; 0 if none do.
    """

    parameter: str
    gain: str = ""
    offset: float = 0.0
    divides: bool = False
    row_block: int = 1
    column_block: int = 1
    constant: float | None = None
    row_factors: str = ""
    column_factors: str = ""
    head: int = 0

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
        if block < MIN_BLOCK or sizes_of(model, value)[1] % size or sizes_of(model, output)[0] % size:
            continue
        yield ParameterFold(f"{value}.weight", row_block=block)
        if model.get_submodule(value).bias is not None:
            yield ParameterFold(f"{value}.bias", row_block=block)
        yield ParameterFold(f"{output}.weight", column_block=block)


def smooth_groups(groups: Groups, model: Any) -> Iterator[SmoothGroup]:
    """Yield the groups that smoothing may change: one for each norm, and one for each layer that one other layer feeds.

    A norm that the output head reads is left out: the head's weight may be that of the embedding.
    """
    head = model.get_output_embeddings()
    for group in groups.norms:
        if all(model.get_submodule(name) is not head for name in group.readers):
            yield SmoothGroup(group.norm, group.readers, sizes_of(model, group.readers[0])[0])
    fed = set()
    for first, second in groups.pairs:
        size, n_columns = sizes_of(model, first)[1], sizes_of(model, second)[0]
        head = head_size(model)
        is_grouped = size != n_columns
        if second not in fed and not (is_grouped and (size % head or n_columns % size)):
            fed.add(second)
            yield SmoothGroup(first, (second,), size, head if is_grouped else 0)


def smoothing_folds(smooth: Iterable[SmoothGroup], groups: Groups, model: Any) -> Iterator[ParameterFold]:
    """Yield the folds of smoothing."""
    offsets = {group.norm: group.offset for group in groups.norms}
    for group in smooth:
        yield ParameterFold(f"{group.name}.weight", offset=offsets.get(group.name, 0.0), row_factors=group.name)
        if getattr(model.get_submodule(group.name), "bias", None) is not None:
            yield ParameterFold(f"{group.name}.bias", row_factors=group.name)
        for name in group.readers:
            yield ParameterFold(f"{name}.weight", column_factors=group.name, head=group.head)


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
        first.constant,
        first.row_factors or second.row_factors,
        first.column_factors or second.column_factors,
        max(first.head, second.head),
    )


def merge(folds: Iterable[ParameterFold]) -> dict[str, ParameterFold]:
    """Return parameter -> its fold."""
    found: dict[str, ParameterFold] = {}
    for fold in folds:
        before = found.get(fold.parameter)
        found[fold.parameter] = merged(before, fold) if before else fold
    return found
