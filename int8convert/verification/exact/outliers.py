"""Pairs the stored outlier columns of an int8 checkpoint with the weights they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from int8convert.checkpoint.directory import read_shard
from int8convert.checkpoint.names import OUTLIERS_FILE, find_file
from int8convert.checkpoint.source import CheckpointSource
from int8convert.conversion.source_rows import values_dtype
from int8convert.errors import CorruptFileError
from int8convert.formats.int8_checkpoint import PlacedTensor
from int8convert.verification.checks import Finding
from int8convert.verification.exact.layout import Int8Pair, Layout
from int8convert.verification.exact.tensors import OutlierPair
from int8convert.verification.exact.values import FLOATS, read_all

_COLUMNS, _WEIGHT = ".outlier_columns", ".outlier_weight"


@dataclass(frozen=True, slots=True)
class PairedOutliers:
    """Stored columns by module, and findings for columns that fit no module."""

    pairs: dict[str, OutlierPair] = field(default_factory=dict, repr=False)
    findings: tuple[Finding, ...] = ()


def pair_outliers(out: CheckpointSource, layout: Layout, is_known: bool) -> PairedOutliers:
    """Read the headers and column numbers of the stored columns.

    Args:
        is_known: whether a manifest names the source; the columns then have the source's dtype.
    """
    path = find_file(out.directory, OUTLIERS_FILE)
    if path is None:
        return PairedOutliers()
    try:
        shard = read_shard(path)
    except CorruptFileError as error:
        return PairedOutliers(findings=(Finding(OUTLIERS_FILE, "a safetensors file", error.message),))
    tensors = {tensor.name: PlacedTensor(tensor, shard) for tensor in shard.tensors}
    weights = {pair.module_name: pair for pair in layout.pairs if isinstance(pair, Int8Pair)}
    pairs: dict[str, OutlierPair] = {}
    findings: list[Finding] = []
    for module in sorted({name.rpartition(".")[0] for name in tensors}):
        if module in layout.planned_modules - weights.keys():
            continue  # the module itself is a finding already
        columns, weight = tensors.get(module + _COLUMNS), tensors.get(module + _WEIGHT)
        if columns is None or weight is None or module not in weights:
            expected = "columns and their weights, of a module that is int8"
            lacking = "one of the two is missing" if module in weights else "no such int8 module"
            findings.append(Finding(f"{OUTLIERS_FILE}: {module}", expected, lacking))
            continue
        wrong = list(_misfits(weights[module], columns, weight, is_known))
        findings += wrong
        if not wrong:
            pairs[module] = OutlierPair(read_all(columns).view(np.int32), weight)
    return PairedOutliers(pairs, tuple(findings))


def _misfits(pair: Int8Pair, columns: PlacedTensor, weight: PlacedTensor, is_known: bool) -> Iterator[Finding]:
    """Find why these are not columns of this weight, by dtype, shape and indices."""
    n_rows, n_columns = pair.planned.shape
    if columns.stored.dtype != "I32" or len(columns.stored.shape) != 1:
        yield Finding(columns.name, "I32 [n]", f"{columns.stored.dtype} {list(columns.stored.shape)}")
        return
    shape = (n_rows, columns.stored.n_elements)
    dtype = values_dtype(pair.planned)
    wanted = {"F32" if dtype == "F64" else dtype} if is_known else FLOATS
    if weight.stored.shape != shape or weight.stored.dtype not in wanted:
        found = f"{weight.stored.dtype} {list(weight.stored.shape)}"
        yield Finding(weight.name, f"{min(wanted)} {list(shape)}", found)
    numbers = read_all(columns).view(np.int32)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= n_columns or (np.diff(numbers) <= 0).any()):
        yield Finding(columns.name, f"ascending columns below {n_columns:,}", f"{numbers[:10].tolist()}")
